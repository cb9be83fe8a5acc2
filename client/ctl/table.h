// Aligned columns on a terminal.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace weightd::ctl {

/// How text output looks.
struct TextStyle {
  bool wide = false;   ///< more columns, nothing left out
  bool color = false;  ///< ANSI colours for states
};

/// Control characters replaced by '?': names come from clients and must not drive a terminal.
std::string Printable(std::string_view text);

/// A state ("SERVING", "POISONED", "attached") in its colour: green ready, red broken, yellow
/// between. Unchanged without colour.
std::string PaintState(std::string_view state, const TextStyle& style);

struct Column {
  std::string title;
  bool right = false;  ///< numbers are right-aligned
  bool state = false;  ///< painted with PaintState
};

/// Collects rows, then prints them with two spaces between columns.
class Table {
 public:
  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}

  /// \pre one cell per column. An empty cell prints as "-".
  void AddRow(std::vector<std::string> cells);
  bool empty() const { return rows_.empty(); }

  /// Header and rows, each line indented by `indent` spaces and ended by a newline, without
  /// trailing blanks.
  std::string Render(const TextStyle& style, int indent = 0) const;

 private:
  std::vector<Column> columns_;
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace weightd::ctl
