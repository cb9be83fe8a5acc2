// NCCL, found at run time and only by workers: a machine without it runs everything but the nccl
// path, and user processes never load ours.
#pragma once

#include <nccl.h>

#include <string>
#include <string_view>

#include "daemon/base/status.h"

namespace weightd {

/// The functions used, under NCCL's names without "nccl".
struct NcclLibrary {
  decltype(&ncclGetVersion) GetVersion;
  decltype(&ncclGetUniqueId) GetUniqueId;
  decltype(&ncclCommInitRankConfig) CommInitRankConfig;
  decltype(&ncclCommGetAsyncError) CommGetAsyncError;
  decltype(&ncclCommAbort) CommAbort;
  decltype(&ncclGroupStart) GroupStart;
  decltype(&ncclGroupEnd) GroupEnd;
  decltype(&ncclSend) Send;
  decltype(&ncclRecv) Recv;
  decltype(&ncclGetErrorString) GetErrorString;
  decltype(&ncclGetLastError) GetLastError;
  int version = 0;  ///< e.g. 22809

  /// OK for success and for work in progress. \error RESOURCE_EXHAUSTED GPU_MEMORY if NCCL found no
  /// device memory, UNAVAILABLE WIRE otherwise; with NCCL's text
  Status ToStatus(ncclResult_t result, std::string_view what, ncclComm_t comm) const;
};

/// libnccl.so.2, loaded once. The same object every time.
/// \error NOT_FOUND NO_PATH with the loader's reason
StatusOr<const NcclLibrary*> LoadNccl();

}  // namespace weightd
