// Where the program is that a client starts as its worker.
#pragma once

#include <string>
#include <vector>

#include "daemon/base/status.h"

namespace weightd {

/// The places that are looked at, in order. A test gives others.
struct BinaryPlaces {
  std::string option;       ///< what the caller named; nothing else is looked at then
  std::string variable;     ///< value of WEIGHTD_BIN; likewise
  std::string library_dir;  ///< of libweightd.so: beside it, or in ../bin
  std::string search_path;  ///< value of PATH
};

/// The places of this process. `option` may be empty.
BinaryPlaces PlacesHere(std::string option);

/// The absolute path of an executable file. Blocks on the file system only.
/// \error FAILED_PRECONDITION WORKER_START naming every place if there is none
StatusOr<std::string> FindWorkerBinary(const BinaryPlaces& places);

}  // namespace weightd
