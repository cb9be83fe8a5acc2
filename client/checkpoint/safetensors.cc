#include "client/checkpoint/safetensors.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <optional>
#include <tuple>
#include <utility>

#include "client/checkpoint/strict_json.h"

namespace weightd {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kLengthBytes = 8;
constexpr char kMetadata[] = "__metadata__";
constexpr char kRemedy[] = "write or download the file again";

constexpr std::array<std::pair<std::string_view, DType>, 12> kDTypes = {{
    {"F32", DType::kFloat32},
    {"F16", DType::kFloat16},
    {"BF16", DType::kBFloat16},
    {"F64", DType::kFloat64},
    {"I8", DType::kInt8},
    {"U8", DType::kUInt8},
    {"I16", DType::kInt16},
    {"I32", DType::kInt32},
    {"I64", DType::kInt64},
    {"BOOL", DType::kBool},
    {"F8_E4M3", DType::kFloat8E4M3FN},
    {"F8_E5M2", DType::kFloat8E5M2},
}};

template <typename... Args>
Status Refuse(std::string_view reason, std::string_view remedy, fmt::format_string<Args...> format,
              Args&&... args) {
  return Error(StatusCode::kInvalidArgument, reason, remedy, format, std::forward<Args>(args)...);
}

// The header's text. Its length is checked before anything is read by it.
StatusOr<std::string_view> HeaderText(std::string_view bytes, const std::string& file) {
  if (bytes.size() < kLengthBytes) {
    return Refuse(reason::kCheckpoint, kRemedy, "{} is too short for safetensors: {} bytes", file,
                  bytes.size());
  }
  uint64_t length = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) {
    length |= uint64_t{static_cast<unsigned char>(bytes[i])} << (8 * i);
  }
  if (length > bytes.size() - kLengthBytes) {
    return Refuse(reason::kCheckpoint, kRemedy,
                  "the header of {} ends beyond the file: header bytes={} file bytes={}", file,
                  length, bytes.size());
  }
  if (length > kMostHeaderBytes) {
    return Refuse(reason::kCheckpoint, kRemedy,
                  "the header of {} is too long: {} bytes, at most {}", file, length,
                  kMostHeaderBytes);
  }
  return bytes.substr(kLengthBytes, length);
}

// An integer from 0 to 2^64 - 1; nullopt for everything else, also for 1.0 and for larger ones.
std::optional<uint64_t> Unsigned(const Json& value) {
  if (!value.is_number_unsigned()) return std::nullopt;
  return value.get<uint64_t>();
}

// One entry of the header, checked for itself.
class Entry {
 public:
  Entry(const std::string& name, const Json& json, const std::string& file)
      : name_(name), json_(json), file_(file) {}

  StatusOr<StoredTensor> Read() {
    StatusOr<StoredTensor> tensor = ReadFields();
    if (!tensor.ok()) return WithTensor(tensor.status(), name_);
    return tensor;
  }

 private:
  StatusOr<StoredTensor> ReadFields() {
    const bool named = !name_.empty() && name_.find('\0') == std::string::npos;
    if (!named || !json_.is_object() || json_.size() != 3 || !json_.contains("dtype") ||
        !json_.contains("shape") || !json_.contains("data_offsets")) {
      return Refuse(reason::kCheckpoint, kRemedy,
                    "an entry of {} is not a name with dtype, shape and data_offsets: {}", file_,
                    name_);
    }
    StoredTensor tensor;
    tensor.info.name = name_;
    WEIGHTD_ASSIGN_OR_RETURN(tensor.info.dtype, ReadDType(json_["dtype"]));
    WEIGHTD_ASSIGN_OR_RETURN(tensor.info.shape, ReadShape(json_["shape"]));
    const Json& offsets = json_["data_offsets"];
    const bool pair = offsets.is_array() && offsets.size() == 2;
    const auto begin = pair ? Unsigned(offsets[0]) : std::nullopt;
    const auto end = pair ? Unsigned(offsets[1]) : std::nullopt;
    if (!begin.has_value() || !end.has_value() || *begin > *end) {
      return Refuse(reason::kCheckpoint, kRemedy,
                    "data_offsets of a tensor in {} are not [begin, end): {} {}", file_, name_,
                    Dump(offsets));
    }
    tensor.begin = *begin;
    tensor.size_bytes = *end - *begin;
    // Fewer than 2^62 elements of at most eight bytes.
    const __int128 wanted = static_cast<__int128>(NumElements(tensor.info.shape)) *
                            static_cast<__int128>(SizeBytes(tensor.info.dtype));
    if (wanted == static_cast<__int128>(tensor.size_bytes)) return tensor;
    return Refuse(reason::kShape, kRemedy,
                  "data of a tensor in {} has another size than dtype and shape say: {} {} {} has "
                  "{} bytes",
                  file_, name_, Name(tensor.info.dtype), ToString(tensor.info.shape),
                  tensor.size_bytes);
  }

  StatusOr<DType> ReadDType(const Json& json) const {
    if (json.is_string()) {
      for (const auto& [text, dtype] : kDTypes) {
        if (json.get_ref<const std::string&>() == text) return dtype;
      }
    }
    return Refuse(
        reason::kDtype, "convert the checkpoint to BF16, F16 or F32, or leave the tensor out",
        "a tensor in {} has a dtype that weightd does not carry: {} {}", file_, name_, Dump(json));
  }

  StatusOr<Shape> ReadShape(const Json& json) const {
    Shape shape;
    bool sound = json.is_array() && json.size() <= static_cast<size_t>(kMaxDims);
    for (size_t i = 0; sound && i < json.size(); ++i) {
      const auto extent = Unsigned(json[i]);
      sound = extent.has_value() && *extent < (uint64_t{1} << 62);
      if (sound) shape.push_back(static_cast<int64_t>(*extent));
    }
    if (sound && ValidShape({shape.begin(), shape.end()})) return shape;
    return Refuse(reason::kShape, kRemedy,
                  "shape of a tensor in {} cannot be (at most {} dimensions and fewer than 2^62 "
                  "elements): {} {}",
                  file_, kMaxDims, name_, Dump(json));
  }

  // Short, so that a lie does not fill the screen.
  static std::string Dump(const Json& json) {
    std::string text = json.dump(-1, ' ', true, Json::error_handler_t::replace);
    if (text.size() > 200) text = text.substr(0, 200) + "...";
    return text;
  }

  const std::string& name_;
  const Json& json_;
  const std::string& file_;
};

// The data from its first to its last byte belongs to exactly one tensor. \pre sorted by begin
Status CheckTiling(const std::vector<StoredTensor>& tensors, uint64_t data_bytes,
                   const std::string& file) {
  uint64_t next = 0;
  std::string before = "the header";
  for (const StoredTensor& tensor : tensors) {
    const std::string& name = tensor.info.name;
    const uint64_t end = tensor.begin + tensor.size_bytes;
    const std::string where = fmt::format("{} at [{}, {})", name, tensor.begin, end);
    Status status;
    if (end > data_bytes) {
      status = Refuse(reason::kCheckpoint, kRemedy,
                      "a tensor lies outside of {}: {}, the file has {} bytes of data", file, where,
                      data_bytes);
    } else if (tensor.begin < next) {
      status = Refuse(reason::kOverlap, kRemedy, "tensors overlap in {}: {} and {}", file, before,
                      where);
    } else if (tensor.begin > next) {
      status = Refuse(reason::kGap, kRemedy,
                      "{} has a hole of {} bytes between {} and the next tensor, {}", file,
                      tensor.begin - next, before, where);
    }
    if (!status.ok()) return WithTensor(status, name);
    next = end;
    before = name;
  }
  if (next == data_bytes) return absl::OkStatus();
  return WithTensor(
      Refuse(reason::kGap, kRemedy, "{} has {} bytes that belong to no tensor, after {}", file,
             data_bytes - next, before),
      tensors.empty() ? "" : before);
}

}  // namespace

StatusOr<std::vector<StoredTensor>> ReadSafetensors(std::string_view bytes,
                                                    const std::string& file) {
  WEIGHTD_ASSIGN_OR_RETURN(const std::string_view text, HeaderText(bytes, file));
  WEIGHTD_ASSIGN_OR_RETURN(const Json header,
                           ParseStrictJson(text, fmt::format("header of {}", file)));
  std::vector<StoredTensor> tensors;
  tensors.reserve(header.size());
  for (const auto& [name, json] : header.items()) {
    if (name == kMetadata) continue;
    WEIGHTD_ASSIGN_OR_RETURN(tensors.emplace_back(), Entry(name, json, file).Read());
  }
  // Empty tensors come before the one that begins where they do.
  std::sort(tensors.begin(), tensors.end(), [](const StoredTensor& a, const StoredTensor& b) {
    return std::tie(a.begin, a.size_bytes) < std::tie(b.begin, b.size_bytes);
  });
  const uint64_t data_begin = kLengthBytes + text.size();
  WEIGHTD_RETURN_IF_ERROR(CheckTiling(tensors, bytes.size() - data_begin, file));
  for (StoredTensor& tensor : tensors) tensor.begin += data_begin;
  return tensors;
}

}  // namespace weightd
