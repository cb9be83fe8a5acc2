// The kernel tables of each instruction set, for cast.cc alone.
#pragma once

#include "daemon/device/host/cast.h"

namespace weightd::host {

const RowKernels& PortableKernels();
#if defined(__x86_64__)
const RowKernels& Avx2Kernels();    // needs AVX2 and F16C
const RowKernels& Avx512Kernels();  // needs AVX-512 F, BW, VL, DQ and F16C
#endif

}  // namespace weightd::host
