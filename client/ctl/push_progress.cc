#include "client/ctl/push_progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "client/ctl/quantity.h"

namespace weightd::ctl {
namespace {

constexpr uint64_t kBarWidth = 20;
constexpr char kClearLine[] = "\r\033[K";

// min(done, total) / total as a number from 0 to `steps`. \pre total > 0
uint64_t Steps(uint64_t done, uint64_t total, uint64_t steps) {
  const auto share = static_cast<double>(std::min(done, total)) / static_cast<double>(total);
  return static_cast<uint64_t>(share * static_cast<double>(steps));
}

void Write(const std::string& text) {
  std::fputs(text.c_str(), stderr);
  std::fflush(stderr);
}

}  // namespace

std::string ProgressBar(const PushMoment& moment) {
  if (moment.bytes_total == 0) return moment.phase;
  const uint64_t filled = Steps(moment.bytes_done, moment.bytes_total, kBarWidth);
  const double rate =
      moment.seconds > 0 ? static_cast<double>(moment.bytes_done) / moment.seconds : 0;
  return fmt::format(
      "{} [{}{}] {:3} %  {} of {}  {}", moment.phase, std::string(filled, '#'),
      std::string(kBarWidth - filled, '.'), Steps(moment.bytes_done, moment.bytes_total, 100),
      HumanBytes(moment.bytes_done), HumanBytes(moment.bytes_total), HumanRate(rate));
}

PushProgress::Style PushProgress::ChooseStyle(bool quiet) {
  if (quiet) return Style::kNone;
  return isatty(STDERR_FILENO) == 1 ? Style::kBar : Style::kLines;
}

PushProgress::~PushProgress() {
  if (style_ == Style::kBar && !phase_.empty()) Write(kClearLine);
}

void PushProgress::Show(std::string_view phase, uint64_t bytes_done, uint64_t bytes_total) {
  if (style_ == Style::kNone || phase.empty()) return;
  const auto now = std::chrono::steady_clock::now();
  const bool next = phase != phase_;
  if (next) {
    phase_ = phase;
    phase_start_ = now;
    tenths_ = 0;
  }
  // Only the transfer moves bytes; afterwards the daemon repeats its last count.
  const bool moves = phase == "transfer";
  const PushMoment moment{phase_, bytes_done, moves ? bytes_total : 0,
                          std::chrono::duration<double>(now - phase_start_).count()};
  if (style_ == Style::kBar) return Write(kClearLine + ProgressBar(moment));
  const uint64_t tenths = moment.bytes_total > 0 ? Steps(bytes_done, bytes_total, 10) : 0;
  if (!next && tenths <= tenths_) return;
  tenths_ = tenths;
  Write(ProgressBar(moment) + "\n");
}

}  // namespace weightd::ctl
