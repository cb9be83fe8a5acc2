// Row kernels for any CPU: one word at a time.
#include "daemon/device/host/row_kernels.h"
#include "daemon/device/host/row_tables.h"

namespace weightd::host {
namespace {

struct Portable {
  using Reg = uint32_t;
  using Acc = uint64_t;
  static constexpr size_t kBytes = 4;

  static Acc Zero() { return 0; }
  static Acc Mac(Acc acc, Reg reg, const uint32_t* weights) {
    return acc + uint64_t{reg} * *weights;
  }
  static uint64_t Sum(Acc acc) { return acc; }
  static Reg Load(const std::byte* from) { return LoadBits<uint32_t>(from); }
  static void Store(std::byte* to, Reg reg) { std::memcpy(to, &reg, sizeof(reg)); }
  static void Stream(std::byte* to, Reg reg) { Store(to, reg); }

  template <class From, class To>
  static Reg Convert(const std::byte* from) {
    if constexpr (std::is_same_v<From, Raw>) {
      return Load(from);
    } else if constexpr (sizeof(typename To::Bits) == 4) {
      return CastOne<From, To>(from);
    } else {
      const Reg low = CastOne<From, To>(from);
      const Reg high = CastOne<From, To>(from + sizeof(typename From::Bits));
      return low | (high << 16);
    }
  }
};

}  // namespace

const RowKernels& PortableKernels() {
  static constexpr RowKernels kernels = MakeKernels<Portable>(Isa::kPortable);
  return kernels;
}

}  // namespace weightd::host
