// Definitions of Session; included by session.h only.
#pragma once

#include "client/src/session.h"

namespace weightd {

template <typename Protocol>
Status Session<Protocol>::Open() {
  thread_ = std::thread([this] {
    loop_.Run([this] { return Advance(); });
    link_.reset();
    Publish([](View& view) { view.cancel_stream = nullptr; });
    stream_.reset();
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
    if (link_ != nullptr) link_->Finish();
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
    endpoint_.reset();
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
    const Status cause = view_.last_error;
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
    if ((link_ == nullptr && heard) || now >= close_by_) loop_.Stop();
    return close_by_;
  }
  Clock::time_point wake = HandleTime();
  const bool fenced = settings_.fence_on_link && link_ != nullptr;
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
  const bool attach = lent_ == Lent::kAttaching && endpoint_.has_value();
  if (lent_ != Lent::kWanted && !attach) return;
  if (link_ != nullptr) FinishLink();
  if (link_ != nullptr) return;  // goes on when the worker has let go
  if (attach) return StartLink();
  lent_ = Lent::kSent;
  announced_.reset();
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
  endpoint_.reset();
  if (link_ != nullptr) FinishLink();
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
  if (event.has_registered() && lent_ == Lent::kSent) {
    lent_ = Lent::kAttaching;
    const v1::WorkerEndpoint& answered = event.registered().worker();
    const bool replaced = announced_.has_value() && announced_->member() == answered.member();
    return OnEndpoint(replaced ? *announced_ : answered);
  }
  // The worker was replaced after the daemon had made its answer and before it was sent.
  if (event.has_worker_changed() && lent_ == Lent::kSent) {
    announced_ = event.worker_changed();
    return;
  }
  if (event.has_worker_changed() && (lent_ == Lent::kAttaching || lent_ == Lent::kDone)) {
    lent_ = Lent::kAttaching;
    Publish([](View& view) { view.registered = false; });
    return OnEndpoint(event.worker_changed());
  }
  HandleEvent(event);
}

/// Without a path there is no worker at the moment: worker_changed follows.
template <typename Protocol>
void Session<Protocol>::OnEndpoint(const v1::WorkerEndpoint& endpoint) {
  endpoint_.reset();
  if (!endpoint.socket_path().empty()) endpoint_ = endpoint;
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
void Session<Protocol>::StartLink() {
  const uint64_t id = ++link_id_;
  link_finishing_ = false;
  device_ = endpoint_->device();
  DataLink::Callbacks callbacks;
  callbacks.on_ready = [this, id](Status status) {
    Post([this, id, status = std::move(status)] {
      if (id == link_id_ && !link_finishing_) OnLinkReady(status);
    });
  };
  callbacks.on_end = [this, id] {
    Post([this, id] {
      if (id == link_id_) OnLinkEnd();
    });
  };
  link_ = std::make_unique<DataLink>(*std::exchange(endpoint_, std::nullopt), Offer(),
                                     std::move(callbacks));
}

/// Lets go of the worker. Where the memory is written, the link lives on until the worker has
/// confirmed the unmapping or is seen dead: that is the fence.
template <typename Protocol>
void Session<Protocol>::FinishLink() {
  if (settings_.fence_on_link) {
    if (!std::exchange(link_finishing_, true)) link_->Finish();
    return;
  }
  ++link_id_;
  link_.reset();
}

template <typename Protocol>
void Session<Protocol>::OnLinkReady(Status status) {
  if (!status.ok()) {
    // A worker that is gone will be replaced; worker_changed then says where.
    if (status.code() != StatusCode::kUnavailable) return FailRegistration(status);
    return Publish([&status](View& view) { view.last_error = status; });
  }
  lent_ = Lent::kDone;
  backoff_ = kFirstBackoff;
  Publish([this](View& view) {
    view.registered = true;
    view.done = view.wanted;
    view.outcome = absl::OkStatus();
    view.last_error = absl::OkStatus();
    view.worker = device_;
  });
  HandleRegistered();
}

template <typename Protocol>
void Session<Protocol>::OnLinkEnd() {
  link_.reset();
  link_finishing_ = false;
  if (lent_ != Lent::kDone) return;
  lent_ = Lent::kAttaching;  // the daemon says where with worker_changed
  Publish([this](View& view) {
    view.registered = false;
    view.worker.clear();
    view.last_error = MakeError(StatusCode::kUnavailable,
                                fmt::format("worker closed its socket: device={}", device_),
                                {.reason = reason::kWorkerLost,
                                 .peer = "worker " + device_,
                                 .remedy = "see the daemon's log; the client attaches again by "
                                           "itself once the worker is back"});
  });
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
  Publish([&status](View& view) {
    view.done = view.wanted;
    view.outcome = status;
    view.has_registration = false;
  });
}

}  // namespace weightd
