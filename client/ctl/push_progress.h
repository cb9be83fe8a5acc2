// How far a push is: a bar on a terminal, plain lines elsewhere.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>

namespace weightd::ctl {

/// Where a sync is.
struct PushMoment {
  std::string phase;  ///< lower case, as in weightctl status
  uint64_t bytes_done = 0;
  uint64_t bytes_total = 0;
  double seconds = 0;  ///< since the phase began
};

/// "transfer [#######.............]  36 %  1.20 GiB of 3.30 GiB  800.00 MiB/s"; the phase alone
/// when it moves no bytes.
std::string ProgressBar(const PushMoment& moment);

/// Shows progress on standard error. A terminal gets a bar in one line, anything else a line for
/// every phase and for every tenth of the transfer.
class PushProgress {
 public:
  enum class Style { kNone, kLines, kBar };
  /// The style for this process: none when `quiet`.
  static Style ChooseStyle(bool quiet);

  explicit PushProgress(Style style) : style_(style) {}
  /// Clears the bar.
  ~PushProgress();
  PushProgress(const PushProgress&) = delete;
  PushProgress& operator=(const PushProgress&) = delete;

  void Show(std::string_view phase, uint64_t bytes_done, uint64_t bytes_total);

 private:
  const Style style_;
  std::string phase_;
  uint64_t tenths_ = 0;
  std::chrono::steady_clock::time_point phase_start_{};
};

}  // namespace weightd::ctl
