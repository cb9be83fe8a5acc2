// A worker without its connection to the daemon: takes commands, gives reports.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "daemon/base/status.h"
#include "daemon/transport/transport.h"
#include "daemon/transport/wire/wire_transport.h"
#include "daemon/worker/job_queue.h"
#include "daemon/worker/member_table.h"
#include "daemon/worker/plan_store.h"
#include "daemon/worker/step_runner.h"
#include "weightd/v1/worker.pb.h"

namespace weightd {

/// Members are served by one thread; plans and steps run on another in the order of their commands,
/// verifications on a third; cancelling and forgetting overtake them.
/// Thread safety: Handle by one thread at a time.
class WorkerCore {
 public:
  struct Options {
    MemberTable::Options members;
    std::string device = kHostDevice;  ///< of the memory that this worker serves
    int num_threads = 0;               ///< of catch-up; 0 = the cores, at most 8
    std::function<void()> on_broken;   ///< ends the process: its transport is of no more use
  };

  /// How a worker moves bytes.
  struct Transports {
    std::unique_ptr<Transport> direct;
    std::unique_ptr<Transport> verifier;   ///< verifies beside the others
    std::unique_ptr<WireTransport> wires;  ///< nullptr: it cannot take part in a wire
  };

  /// `report` takes everything that the daemon must hear, from several threads, until the
  /// destructor returns. \error UNAVAILABLE SOCKET, see DataListener
  static StatusOr<std::unique_ptr<WorkerCore>> Create(const Options& options, Transports transports,
                                                      ReportFn report);
  /// Cancels what runs and waits for it.
  ~WorkerCore();

  /// Returns at once; what it leads to is reported. Every RunStep is answered by one StepDone, also
  /// when it was cancelled before it began.
  void Handle(v1::WorkerCommand command);

 private:
  struct Assembly {
    PlanAssembler assembler;
    Status error;  ///< of an earlier page
  };

  WorkerCore(const Options& options, std::unique_ptr<MemberTable> members, Transports transports,
             ReportFn report);
  void Cancel(const v1::AttemptId& attempt);
  void CancelOpening(uint64_t wire);
  void RaiseLanded(const v1::Landed& landed);
  void RunJob(Job& job);
  void RunStep(Job& job);
  void EndIfBroken();
  void EndIf(bool broken) const;
  void AddPlanPage(const v1::PlanPage& page);
  void MakeWireId(uint64_t wire);
  void OpenWire(Job& job);
  void CloseWire(uint64_t wire);

  const ReportFn report_;
  const std::function<void()> on_broken_;
  const std::string device_;
  const std::unique_ptr<MemberTable> members_;
  const Transports transports_;

  // Thread of jobs_ only.
  std::map<uint64_t, Assembly> assemblies_;    ///< by plan handle
  std::map<uint64_t, uint64_t> plan_of_wire_;  ///< of the wires that were opened
  // Threads of both.
  PlanStore plans_;
  StepRunner runner_;

  JobQueue jobs_;
  JobQueue verifications_;
};

}  // namespace weightd
