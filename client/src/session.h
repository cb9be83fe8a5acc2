// What actors and engines have in common: a session with the daemon that comes back by itself, and
// the memory that is lent to the worker. One thread owns all of it.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "client/src/control_stream.h"
#include "client/src/dial.h"
#include "client/src/event_loop.h"
#include "client/src/link_set.h"
#include "client/src/own_worker.h"
#include "daemon/base/clock.h"
#include "daemon/base/status.h"
#include "daemon/base/version.h"
#include "daemon/wire/convert.h"
#include "weightd/v1/types.pb.h"

namespace weightd {

/// How a session reaches its daemon.
struct SessionSettings {
  Address address;
  milliseconds connect_timeout{10'000};
  bool background = false;     ///< the caller waits neither for the daemon nor for registration
  bool fence_on_link = false;  ///< report to a daemon only when no worker maps the memory any more
  std::optional<SpawnSettings> spawn;  ///< this client starts the worker of its device if asked to
};

/// `Protocol` names the gRPC service and its two messages. Life of a session: dial, hello, welcome,
/// register (pages, `registered`), attach to the workers, serve events. Whatever breaks, it goes
/// back to the first step that is needed and comes forward again, with a backoff of 50 ms to 1 s.
/// Thread safety: public functions may be called by any thread of the process that made the object;
/// hooks and members marked so belong to the session's thread.
template <typename Protocol>
class Session {
 public:
  using Request = typename Protocol::Request;
  using Event = typename Protocol::Event;

  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  /// \pre Close was called
  virtual ~Session() = default;

  /// False in a forked child, where the object must not be touched.
  bool usable() const { return ::getpid() == pid_; }

  /// Starts the thread and, unless in the background, waits for the daemon's welcome.
  Status Open();
  /// Ends the session; returns when its thread has ended.
  void Close();

 protected:
  explicit Session(SessionSettings settings)
      : settings_(std::move(settings)),
        links_(settings_.fence_on_link, LinkCallbacks()),
        own_worker_(settings_.spawn, settings_.address.text,
                    [this](uint64_t order, const std::string& how) {
                      Post([this, order, how] {
                        ReportWorker(own_worker_.Ended(order, how, registering()));
                      });
                    }) {}

  // Hooks, called by the session's thread.
  virtual Request Hello() = 0;
  virtual std::vector<Request> Registration() = 0;
  virtual std::shared_ptr<const MemoryOffer> Offer() = 0;
  virtual void HandleEvent(const Event& event) = 0;
  /// A non-fatal error that does not concern the registration.
  virtual void HandleError(const Status& error) = 0;
  virtual void HandleLost(const Status& cause) = 0;
  virtual void HandleRegistered() = 0;
  /// Acts on the session's own deadlines; returns the next.
  virtual Clock::time_point HandleTime() { return Clock::time_point::max(); }
  /// The last words to the daemon before the stream ends.
  virtual void HandleClose() {}

  /// Registers what Registration() and Offer() give after `install` has run on the session's
  /// thread; waits for the outcome unless in the background.
  Status RegisterAndWait(std::function<void()> install);

  /// Session thread: sends unless the daemon is gone, in which case the request is void.
  void Send(const Request& request) {
    if (control_ == Control::kReady) stream_->Send(request);
  }
  bool lent() const { return lent_ == Lent::kDone; }  ///< session thread
  bool spawns_worker() const { return settings_.spawn.has_value(); }
  void Post(std::function<void()> task) { loop_.Post(std::move(task)); }

  /// What callers see. Guarded by mutex_; changed_ tells of every change.
  struct View {
    bool connected = false;
    bool registered = false;
    uint64_t wanted = 0;  ///< registrations asked for
    uint64_t done = 0;    ///< of which the outcome is known
    Status outcome;       ///< of the last of them
    bool has_registration = false;
    Status last_error;  ///< why the session is not as it should be; OK when it is
    Status fatal;       ///< not OK: the session is over
    Clock::time_point down_since = Clock::now();
    std::string worker;  ///< own device, while its worker holds the memory
    bool stopped = false;
    uint64_t changes = 0;  ///< counts changes
    std::function<void()> cancel_stream;
  };
  View view_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;

  /// Changes the view (or a derived class's part of it) and wakes those who wait.
  template <typename Fn>
  void Publish(Fn&& change) {
    const std::lock_guard lock(mutex_);
    change(view_);
    ++view_.changes;
    changed_.notify_all();
  }

  const SessionSettings settings_;

 private:
  using Stream = ControlStream<typename Protocol::Service, Request, Event>;
  enum class Control { kDown, kOpening, kReady };
  enum class Lent { kNothing, kWanted, kSent, kAttaching, kDone };

  static constexpr milliseconds kFirstBackoff{50};
  static constexpr milliseconds kLastBackoff{1'000};
  static constexpr milliseconds kDialTimeout{1'000};
  static constexpr milliseconds kWelcomeTimeout{10'000};
  static constexpr milliseconds kRegisterTimeout{60'000};
  static constexpr milliseconds kCloseTimeout{5'000};

  Clock::time_point Advance();
  void AdvanceLending();
  void Dial();
  void Lost(Status cause);
  void OnEvent(Event event);
  void OnWelcome(const v1::ProtocolVersion& protocol);
  void OnError(const Status& error, bool fatal);
  void OnRegistered(const v1::WorkerEndpoint& own);
  LinkSet::Callbacks LinkCallbacks();
  void OnLinkReady(const std::string& device, Status status);
  void OnLinkEnd(const std::string& device, bool lost);
  void AwaitAttached();
  void ReportWorker(const std::optional<OwnWorker::Report>& report);
  void FailRegistration(const Status& status);
  bool registering() const;

  const pid_t pid_ = ::getpid();
  EventLoop loop_;

  // The session thread's own.
  Control control_ = Control::kDown;
  Lent lent_ = Lent::kNothing;
  std::unique_ptr<Stream> stream_;
  uint64_t stream_id_ = 0;  // tells late callbacks of earlier streams apart
  LinkSet links_;
  OwnWorker own_worker_;
  std::vector<v1::WorkerEndpoint> announced_;  // by worker_changed, ahead of the registration
  Clock::time_point retry_at_ = Clock::time_point::min();
  Clock::time_point welcome_by_;
  milliseconds backoff_ = kFirstBackoff;
  bool was_connected_ = false;
  bool over_ = false;  // view_.fatal is set
  bool closing_ = false;
  Clock::time_point close_by_;

  std::thread thread_;
};

}  // namespace weightd

#include "client/src/session_impl.h"
