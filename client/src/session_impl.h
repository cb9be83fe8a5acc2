// Definitions of Session; included by session.h only.
#pragma once

#include "client/src/session.h"

namespace weightd {

template <typename Protocol>
Status Session<Protocol>::Open() {
  thread_ = std::thread([this] {
    loop_.Run([this] { return Advance(); });
    links_.Clear();
    Publish([](View& view) { view.cancel_stream = nullptr; });
    stream_.reset();
    own_worker_.Quit();
    Publish([](View& view) { view.stopped = true; });
  });
  if (settings_.background) return absl::OkStatus();
  const Clock::time_point deadline = Clock::now() + settings_.connect_timeout;
  std::unique_lock lock(mutex_);
  const bool known =
      changed_.wait_until(lock, deadline, [this] { return view_.connected || !view_.fatal.ok(); });
  if (known) return view_.fatal;
  if (!view_.last_error.ok()) return view_.last_error;
  return MakeError(StatusCode::kUnavailable,
                   fmt::format("daemon did not answer: address={} waited ms={}",
                               settings_.address.text, settings_.connect_timeout.count()),
                   {.reason = reason::kDaemonLost,
                    .peer = "daemon " + settings_.address.text,
                    .remedy = "check that weightd is running and not stopped"});
}

template <typename Protocol>
void Session<Protocol>::Close() {
  Post([this] {
    closing_ = true;
    close_by_ = Clock::now() + kCloseTimeout;
    if (control_ == Control::kReady) {
      HandleClose();
      stream_->HalfClose();
    }
    links_.Finish();
  });
  {
    std::unique_lock lock(mutex_);
    const auto stopped = [this] { return view_.stopped; };
    // A daemon that does not read can hold the thread in a send.
    if (!changed_.wait_for(lock, kCloseTimeout + kDialTimeout, stopped) &&
        view_.cancel_stream != nullptr) {
      view_.cancel_stream();
    }
  }
  thread_.join();
}

template <typename Protocol>
Status Session<Protocol>::RegisterAndWait(std::function<void()> install) {
  uint64_t mine = 0;
  Publish([&mine](View& view) {
    mine = ++view.wanted;
    const bool refusal = view.last_error.code() != StatusCode::kUnavailable;
    if (refusal) view.last_error = absl::OkStatus();  // of the registration before
  });
  Post([this, install = std::move(install)] {
    install();
    lent_ = Lent::kWanted;
    Publish([](View& view) { view.registered = false, view.has_registration = true; });
  });
  if (settings_.background) return absl::OkStatus();
  const Clock::time_point last = Clock::now() + kRegisterTimeout;
  std::unique_lock lock(mutex_);
  while (view_.done < mine && view_.fatal.ok()) {
    const Clock::time_point wake =
        view_.connected ? last : view_.down_since + settings_.connect_timeout;
    const uint64_t seen = view_.changes;
    const auto changed = [this, seen] { return view_.changes != seen; };
    if (changed_.wait_until(lock, wake, changed)) continue;
    Status cause = view_.last_error;
    lock.unlock();
    Post([this] { lent_ = Lent::kNothing; });
    Publish([](View& view) { view.done = view.wanted, view.has_registration = false; });
    if (!cause.ok()) return cause;
    return Error(StatusCode::kDeadlineExceeded, reason::kDeadline,
                 "check that weightd and its worker are running and not stopped",
                 "registration was not answered in time: address={}", settings_.address.text);
  }
  return view_.fatal.ok() ? view_.outcome : view_.fatal;
}

template <typename Protocol>
Clock::time_point Session<Protocol>::Advance() {
  const Clock::time_point now = Clock::now();
  if (closing_) {
    const bool heard = control_ != Control::kReady;  // the daemon has ended the stream, too
    if ((links_.empty() && heard) || now >= close_by_) loop_.Stop();
    return close_by_;
  }
  if (now >= own_worker_.deadline()) ReportWorker(own_worker_.Late(registering()));
  Clock::time_point wake = std::min(HandleTime(), own_worker_.deadline());
  const bool fenced = settings_.fence_on_link && !links_.empty();
  if (control_ == Control::kDown && !over_ && !fenced) {
    if (now < retry_at_) return std::min(wake, retry_at_);
    Dial();
    return now;
  }
  if (control_ == Control::kOpening) {
    if (now < welcome_by_) return std::min(wake, welcome_by_);
    Lost(Error(StatusCode::kUnavailable, reason::kDaemonLost,
               "check that weightd is running and not stopped",
               "daemon did not answer the greeting: address={}", settings_.address.text));
    return now;
  }
  if (control_ == Control::kReady) AdvanceLending();
  return wake;
}

template <typename Protocol>
void Session<Protocol>::AdvanceLending() {
  if (lent_ == Lent::kAttaching) return links_.Advance([this] { return Offer(); });
  if (lent_ != Lent::kWanted) return;
  links_.LetGo();
  if (!links_.empty()) return;  // goes on when the workers have let go
  lent_ = Lent::kSent;
  announced_.clear();
  for (const Request& request : Registration()) stream_->Send(request);
}

template <typename Protocol>
void Session<Protocol>::Dial() {
  const uint64_t id = ++stream_id_;
  typename Stream::Callbacks callbacks;
  callbacks.on_event = [this, id](Event event) {
    Post([this, id, event = std::move(event)]() mutable {
      if (id == stream_id_) OnEvent(std::move(event));
    });
  };
  callbacks.on_end = [this, id](Status status) {
    Post([this, id, status = std::move(status)] {
      if (id == stream_id_) Lost(status);
    });
  };
  auto stream = Stream::Open(settings_.address, Clock::now() + kDialTimeout, std::move(callbacks));
  if (!stream.ok()) return Lost(stream.status());
  stream_ = *std::move(stream);
  Publish([this](View& view) { view.cancel_stream = [raw = stream_.get()] { raw->Cancel(); }; });
  control_ = Control::kOpening;
  welcome_by_ = Clock::now() + kWelcomeTimeout;
  stream_->Send(Hello());
}

/// Ends the connection to the daemon and plans the next, unless the cause is final.
template <typename Protocol>
void Session<Protocol>::Lost(Status cause) {
  if (closing_) {
    control_ = Control::kDown;
    return;
  }
  const ErrorFields fields = FieldsOf(cause);
  const bool refused = cause.code() != StatusCode::kUnavailable;
  const bool superseded = fields.reason == reason::kFenced && cause.code() == StatusCode::kAborted;
  over_ = fields.reason == reason::kProtocolVersion || superseded ||
          (refused && !was_connected_ && !settings_.background);
  ++stream_id_;
  Publish([](View& view) { view.cancel_stream = nullptr; });
  stream_.reset();
  const bool was_ready = control_ == Control::kReady;
  control_ = Control::kDown;
  if (refused && registering()) FailRegistration(cause);
  if (lent_ != Lent::kNothing) lent_ = Lent::kWanted;
  links_.LetGo();
  own_worker_.Quit();
  retry_at_ = Clock::now() + backoff_;
  backoff_ = std::min(backoff_ * 2, kLastBackoff);
  Publish([this, &cause](View& view) {
    if (view.connected) view.down_since = Clock::now();
    view.connected = false;
    view.registered = false;
    view.last_error = cause;
    if (over_) view.fatal = cause;
  });
  if (was_ready || over_) HandleLost(cause);
}

template <typename Protocol>
void Session<Protocol>::OnEvent(Event event) {
  if (event.has_welcome()) return OnWelcome(event.welcome().protocol());
  if (event.has_error()) return OnError(FromProto(event.error().detail()), event.error().fatal());
  if (event.has_start_worker()) {
    if (!closing_) own_worker_.Start(event.start_worker());
    return;
  }
  if (event.has_stop_worker()) return own_worker_.Stop(event.stop_worker());
  if (event.has_worker_changed()) own_worker_.Seen(event.worker_changed());
  if (event.has_registered() && lent_ == Lent::kSent) {
    if constexpr (requires { event.registered().writers(); }) {
      for (const v1::WorkerEndpoint& writer : event.registered().writers()) links_.Aim(writer);
    }
    return OnRegistered(event.registered().worker());
  }
  // A worker was replaced after the daemon had made its answer and before it was sent.
  if (event.has_worker_changed() && lent_ == Lent::kSent) {
    announced_.push_back(event.worker_changed());
    return;
  }
  if (event.has_worker_changed() && (lent_ == Lent::kAttaching || lent_ == Lent::kDone)) {
    lent_ = Lent::kAttaching;
    Publish([](View& view) { view.registered = false; });
    return links_.Aim(event.worker_changed());
  }
  HandleEvent(event);
}

template <typename Protocol>
void Session<Protocol>::OnRegistered(const v1::WorkerEndpoint& own) {
  lent_ = Lent::kAttaching;
  links_.SetOwn(own.device());
  links_.Aim(own);
  for (const v1::WorkerEndpoint& endpoint : announced_) {
    if (endpoint.member() == own.member()) links_.Aim(endpoint);
  }
}

template <typename Protocol>
void Session<Protocol>::OnWelcome(const v1::ProtocolVersion& protocol) {
  if (protocol.major() != kProtocolMajor) {
    return Lost(
        MakeError(StatusCode::kFailedPrecondition,
                  fmt::format("daemon speaks another protocol: daemon={}.{} client={}.{}",
                              protocol.major(), protocol.minor(), kProtocolMajor, kProtocolMinor),
                  {.reason = reason::kProtocolVersion,
                   .peer = "daemon " + settings_.address.text,
                   .remedy = "use the daemon and the client library of one release"}));
  }
  control_ = Control::kReady;
  was_connected_ = true;
  const bool settled = lent_ == Lent::kNothing;  // otherwise when the memory is lent again
  if (settled) backoff_ = kFirstBackoff;
  Publish([settled](View& view) {
    view.connected = true;
    if (settled) view.last_error = absl::OkStatus();
  });
}

template <typename Protocol>
void Session<Protocol>::OnError(const Status& error, bool fatal) {
  if (fatal || control_ != Control::kReady) return Lost(error);
  if (registering() || lent_ == Lent::kSent) return FailRegistration(error);
  HandleError(error);
}

template <typename Protocol>
LinkSet::Callbacks Session<Protocol>::LinkCallbacks() {
  LinkSet::Callbacks callbacks;
  callbacks.post = [this](std::function<void()> task) { Post(std::move(task)); };
  callbacks.on_ready = [this](const std::string& device, Status status) {
    OnLinkReady(device, std::move(status));
  };
  callbacks.on_end = [this](const std::string& device, bool lost) { OnLinkEnd(device, lost); };
  return callbacks;
}

template <typename Protocol>
void Session<Protocol>::OnLinkReady(const std::string& device, Status status) {
  if (!status.ok()) {
    // A worker that is gone will be replaced; worker_changed then says where.
    if (status.code() != StatusCode::kUnavailable) return FailRegistration(status);
    return Publish([&status](View& view) { view.last_error = status; });
  }
  if (device == links_.own()) Publish([&device](View& view) { view.worker = device; });
  AwaitAttached();
}

/// The memory is lent once no worker that runs is missing.
template <typename Protocol>
void Session<Protocol>::AwaitAttached() {
  if (lent_ != Lent::kAttaching || !links_.complete()) return;
  lent_ = Lent::kDone;
  backoff_ = kFirstBackoff;
  Publish([](View& view) {
    view.registered = true;
    view.done = view.wanted;
    view.outcome = absl::OkStatus();
    view.last_error = absl::OkStatus();
  });
  HandleRegistered();
}

/// A lost worker is replaced: the daemon says where with worker_changed.
template <typename Protocol>
void Session<Protocol>::OnLinkEnd(const std::string& device, bool lost) {
  if (!lost) return AwaitAttached();  // it was not there, after all
  if (lent_ != Lent::kDone && lent_ != Lent::kAttaching) return;
  lent_ = Lent::kAttaching;
  Publish([this, &device](View& view) {
    view.registered = false;
    if (device == links_.own()) view.worker.clear();
    view.last_error = MakeError(StatusCode::kUnavailable,
                                fmt::format("worker closed its socket: device={}", device),
                                {.reason = reason::kWorkerLost,
                                 .peer = "worker " + device,
                                 .remedy = "see the daemon's log; the client attaches again by "
                                           "itself once the worker is back"});
  });
}

/// Tells the daemon and the caller of an end of the worker that this client runs.
template <typename Protocol>
void Session<Protocol>::ReportWorker(const std::optional<OwnWorker::Report>& report) {
  if (!report.has_value()) return;
  Request request;
  *request.mutable_worker_ended() = report->message;
  Send(request);
  if (report->message.given_up()) return FailRegistration(report->error);
  Publish([&report](View& view) { view.last_error = report->error; });
}

/// True while a caller waits for the outcome of its registration.
template <typename Protocol>
bool Session<Protocol>::registering() const {
  if (lent_ != Lent::kSent && lent_ != Lent::kAttaching) return false;
  const std::lock_guard lock(mutex_);
  return view_.done < view_.wanted && !settings_.background;
}

/// A registration that nobody waits for is one that was good before: it is tried again.
template <typename Protocol>
void Session<Protocol>::FailRegistration(const Status& status) {
  if (!registering()) return Lost(status);
  lent_ = Lent::kNothing;
  links_.LetGo();
  Publish([&status](View& view) {
    view.done = view.wanted;
    view.outcome = status;
    view.has_registration = false;
  });
}

}  // namespace weightd
