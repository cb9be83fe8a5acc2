// The table of configuration keys: name, place in Config, accepted values. Internal to the edge.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "daemon/server/edge/config.h"

namespace weightd::config {

/// Returns what is wrong with a text value, or nullopt.
using TextCheck = std::optional<std::string> (*)(const std::string& value);

struct TextSlot {
  std::string* value;
  TextCheck check;
};
struct FlagSlot {
  bool* value;
};
/// A whole number; `bytes` also takes a text with KiB, MiB or GiB.
struct CountSlot {
  uint64_t* value;
  uint64_t min;
  uint64_t max;
  bool bytes;
};
/// A text with a unit: "100ms", "15s", "2m", "1h".
struct DurationSlot {
  std::chrono::milliseconds* value;
  std::chrono::milliseconds min;
  std::chrono::milliseconds max;
};

/// A list of texts; as one text its items are separated by commas.
struct ListSlot {
  std::vector<std::string>* value;
  std::optional<std::string> (*check)(const std::vector<std::string>& value);
};

struct Key {
  const char* section;
  const char* name;
  std::variant<TextSlot, FlagSlot, CountSlot, DurationSlot, ListSlot> slot;

  std::string FullName() const { return std::string(section) + "." + name; }
  /// WEIGHTD_<SECTION>_<KEY>
  std::string Environment() const;
};

/// Every key, bound to the fields of `config`, which must outlive the result.
std::vector<Key> BindKeys(Config* config);

/// A value as a layer gives it, before the key's type is known. monostate is a value of a type that
/// no key takes (a float, a date, an array of anything but texts).
using RawValue = std::variant<std::monostate, std::string, bool, int64_t, std::vector<std::string>>;

/// Stores `value` in the key's field. Returns what is wrong with it, or nullopt.
std::optional<std::string> Assign(const Key& key, const RawValue& value);

/// Same for a text from the environment or --set, where every type is written as text.
std::optional<std::string> AssignText(const Key& key, const std::string& text);

/// The candidate with the smallest edit distance to `word`; empty if none is near.
std::string Nearest(std::string_view word, const std::vector<std::string>& candidates);

}  // namespace weightd::config
