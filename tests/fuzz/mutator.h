// Deterministic fuzzing: bytes that are nearly right, and messages whose fields have awkward
// values.
#pragma once

#include <google/protobuf/message.h>

#include <cstdint>
#include <random>
#include <string>
#include <vector>

namespace weightd::fuzz {

/// Draws inputs. The same seed gives the same inputs.
class Mutator {
 public:
  explicit Mutator(uint64_t seed) : random_(seed) {}

  int64_t Number(int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(random_);
  }
  bool Chance(int percent) { return Number(1, 100) <= percent; }
  std::string Noise(size_t size);

  /// Flips, deletes, doubles, moves or inserts a few parts of `text`.
  std::string Mutate(std::string text);

  /// Sets every field of a message at random: often empty, often at the edge of its type.
  /// `words`: texts that mean something to the receiver.
  void Fill(google::protobuf::Message* message, const std::vector<std::string>& words,
            int depth = 0);
  /// Sets one field, anywhere in a message that is otherwise right.
  void Disturb(google::protobuf::Message* message, const std::vector<std::string>& words);

 private:
  uint64_t Awkward();
  void Set(google::protobuf::Message* message, const google::protobuf::FieldDescriptor* field,
           const std::vector<std::string>& words, int depth);

  std::mt19937_64 random_;
};

}  // namespace weightd::fuzz
