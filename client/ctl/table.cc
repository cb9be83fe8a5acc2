#include "client/ctl/table.h"

#include <algorithm>

#include "daemon/base/status.h"

namespace weightd::ctl {
namespace {

constexpr char kGreen[] = "\033[32m";
constexpr char kYellow[] = "\033[33m";
constexpr char kRed[] = "\033[31m";
constexpr char kReset[] = "\033[0m";

const char* ColorOf(std::string_view state) {
  for (std::string_view good : {"SERVING", "attached", "yes", "committed", "healthy"}) {
    if (state == good) return kGreen;
  }
  for (std::string_view bad : {"POISONED", "GONE", "lost", "failed", "unhealthy"}) {
    if (state == bad) return kRed;
  }
  return kYellow;
}

// Columns that a UTF-8 text takes, counting every code point as one.
size_t Width(std::string_view text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  }));
}

void Append(const std::string& text, const std::string& shown, size_t width, bool right,
            std::string* line) {
  const std::string padding(width - Width(text), ' ');
  *line += right ? padding + shown : shown + padding;
}

}  // namespace

std::string Printable(std::string_view text) {
  std::string result(text);
  for (char& c : result) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = '?';
  }
  return result;
}

std::string PaintState(std::string_view state, const TextStyle& style) {
  if (!style.color || state == "-") return std::string(state);
  return ColorOf(state) + std::string(state) + kReset;
}

void Table::AddRow(std::vector<std::string> cells) {
  WEIGHTD_CHECK(cells.size() == columns_.size());
  for (std::string& cell : cells) cell = cell.empty() ? "-" : Printable(cell);
  rows_.push_back(std::move(cells));
}

std::string Table::Render(const TextStyle& style, int indent) const {
  std::vector<size_t> widths;
  for (size_t c = 0; c < columns_.size(); ++c) {
    widths.push_back(Width(columns_[c].title));
    for (const auto& row : rows_) widths[c] = std::max(widths[c], Width(row[c]));
  }
  std::string result;
  const auto end_line = [&](std::string line) {
    line.erase(line.find_last_not_of(' ') + 1);
    result += line + "\n";
  };
  const std::string start(static_cast<size_t>(indent), ' ');
  std::string head = start;
  for (size_t c = 0; c < columns_.size(); ++c) {
    if (c > 0) head += "  ";
    Append(columns_[c].title, columns_[c].title, widths[c], columns_[c].right, &head);
  }
  end_line(head);
  for (const auto& row : rows_) {
    std::string line = start;
    for (size_t c = 0; c < columns_.size(); ++c) {
      if (c > 0) line += "  ";
      const std::string shown = columns_[c].state ? PaintState(row[c], style) : row[c];
      Append(row[c], shown, widths[c], columns_[c].right, &line);
    }
    end_line(line);
  }
  return result;
}

}  // namespace weightd::ctl
