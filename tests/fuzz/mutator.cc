#include "tests/fuzz/mutator.h"

#include <algorithm>

namespace weightd::fuzz {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

constexpr int kDeepest = 6;

}  // namespace

std::string Mutator::Noise(size_t size) {
  std::string bytes(size, '\0');
  for (char& byte : bytes) byte = static_cast<char>(Number(0, 255));
  return bytes;
}

std::string Mutator::Mutate(std::string text) {
  for (int64_t times = Number(1, 4); times > 0 && !text.empty(); --times) {
    const auto at = static_cast<size_t>(Number(0, static_cast<int64_t>(text.size()) - 1));
    const auto length = static_cast<size_t>(
        Number(1, std::min<int64_t>(24, static_cast<int64_t>(text.size() - at))));
    const std::string part = text.substr(at, length);
    switch (Number(0, 4)) {
      case 0:
        text[at] = static_cast<char>(text[at] ^ (1 << Number(0, 7)));
        break;
      case 1:
        text.erase(at, length);
        break;
      case 2:
        text.insert(at, part);
        break;
      case 3:
        text.erase(at, length);
        text.insert(static_cast<size_t>(Number(0, static_cast<int64_t>(text.size()))), part);
        break;
      default:
        text.insert(at, Noise(static_cast<size_t>(Number(1, 8))));
    }
  }
  return text;
}

uint64_t Mutator::Awkward() {
  constexpr uint64_t kEdges[] = {0,       1,          2,           3,          7,
                                 8,       255,        4096,        0x7fffffff, 0x80000000,
                                 1 << 20, 0xffffffff, 1ull << 32,  1ull << 61, 1ull << 62,
                                 ~0ull,   ~0ull >> 1, ~0ull << 63, 0xfffffffe, 1ull << 40};
  if (Chance(20)) return random_();
  return kEdges[Number(0, std::size(kEdges) - 1)];
}

void Mutator::Set(Message* message, const FieldDescriptor* field,
                  const std::vector<std::string>& words, int depth) {
  const Reflection* to = message->GetReflection();
  const bool many = field->is_repeated();
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
    case FieldDescriptor::CPPTYPE_ENUM: {
      const auto value = static_cast<int32_t>(Awkward());
      const bool number = field->cpp_type() == FieldDescriptor::CPPTYPE_INT32;
      if (number)
        return many ? to->AddInt32(message, field, value) : to->SetInt32(message, field, value);
      return many ? to->AddEnumValue(message, field, value)
                  : to->SetEnumValue(message, field, value);
    }
    case FieldDescriptor::CPPTYPE_UINT32: {
      const auto value = static_cast<uint32_t>(Awkward());
      return many ? to->AddUInt32(message, field, value) : to->SetUInt32(message, field, value);
    }
    case FieldDescriptor::CPPTYPE_INT64: {
      const auto value = static_cast<int64_t>(Awkward());
      return many ? to->AddInt64(message, field, value) : to->SetInt64(message, field, value);
    }
    case FieldDescriptor::CPPTYPE_UINT64:
      return many ? to->AddUInt64(message, field, Awkward())
                  : to->SetUInt64(message, field, Awkward());
    case FieldDescriptor::CPPTYPE_BOOL:
      return many ? to->AddBool(message, field, Chance(50))
                  : to->SetBool(message, field, Chance(50));
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return many ? to->AddDouble(message, field, -1e300) : to->SetDouble(message, field, -1e300);
    case FieldDescriptor::CPPTYPE_FLOAT:
      return many ? to->AddFloat(message, field, -1e30f) : to->SetFloat(message, field, -1e30f);
    case FieldDescriptor::CPPTYPE_STRING: {
      const auto last = static_cast<int64_t>(words.size()) - 1;
      const bool known = last >= 0 && Chance(70);
      std::string text = known ? words[static_cast<size_t>(Number(0, last))]
                               : std::string(static_cast<size_t>(Number(0, 40)), 'x');
      if (field->type() == FieldDescriptor::TYPE_BYTES) text = Noise(16);
      return many ? to->AddString(message, field, std::move(text))
                  : to->SetString(message, field, std::move(text));
    }
    case FieldDescriptor::CPPTYPE_MESSAGE:
      if (depth >= kDeepest) return;
      return Fill(many ? to->AddMessage(message, field) : to->MutableMessage(message, field), words,
                  depth + 1);
  }
}

void Mutator::Fill(Message* message, const std::vector<std::string>& words, int depth) {
  const auto* type = message->GetDescriptor();
  for (int i = 0; i < type->field_count(); ++i) {
    const FieldDescriptor* field = type->field(i);
    const int64_t times = field->is_repeated() ? Number(0, 3) : Chance(70) ? 1 : 0;
    for (int64_t n = 0; n < times; ++n) Set(message, field, words, depth);
  }
}

void Mutator::Disturb(Message* message, const std::vector<std::string>& words) {
  const auto* type = message->GetDescriptor();
  if (type->field_count() == 0) return;
  const FieldDescriptor* field = type->field(static_cast<int>(Number(0, type->field_count() - 1)));
  const Reflection* in = message->GetReflection();
  const bool inside = field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE;
  if (inside && field->is_repeated() && in->FieldSize(*message, field) > 0 && Chance(80)) {
    const auto last = static_cast<int64_t>(in->FieldSize(*message, field)) - 1;
    return Disturb(in->MutableRepeatedMessage(message, field, static_cast<int>(Number(0, last))),
                   words);
  }
  if (inside && !field->is_repeated() && in->HasField(*message, field) && Chance(80)) {
    return Disturb(in->MutableMessage(message, field), words);
  }
  if (field->is_repeated() && in->FieldSize(*message, field) > 0 && Chance(50)) {
    return in->RemoveLast(message, field);
  }
  Set(message, field, words, 0);
}

}  // namespace weightd::fuzz
