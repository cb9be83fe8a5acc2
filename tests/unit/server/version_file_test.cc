#include "daemon/server/version_file.h"

#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>

namespace weightd {
namespace {

struct Folder {
  std::filesystem::path path =
      std::filesystem::temp_directory_path() / ("weightd-versions-" + std::to_string(::getpid()));
  Folder() { std::filesystem::remove_all(path); }
  ~Folder() { std::filesystem::remove_all(path); }
};

TEST_CASE("the highest version survives a restart and the epoch grows") {
  const Folder folder;
  uint64_t epoch = 0;
  {
    auto file = VersionFile::Open(folder.path);
    REQUIRE(file.ok());
    epoch = (*file)->epoch();
    REQUIRE((*file)->Save("m", 7).ok());
    REQUIRE((*file)->Save("m", 3).ok());
  }
  auto again = VersionFile::Open(folder.path);
  REQUIRE(again.ok());
  CHECK((*again)->epoch() > epoch);
  CHECK((*again)->Highest("m") == 7);
  CHECK((*again)->Highest("another") == 0);
}

TEST_CASE("a file that weightd did not write is refused, not overwritten") {
  const Folder folder;
  std::filesystem::create_directory(folder.path);
  std::ofstream(folder.path / "versions.json") << "{\"epoch\": -1";
  const auto file = VersionFile::Open(folder.path);
  REQUIRE_FALSE(file.ok());
  CHECK(FieldsOf(file.status()).reason == reason::kConfig);
  CHECK(Message(file.status()).find("versions.json") != std::string::npos);
}

TEST_CASE("without a state_dir nothing is written and versions live in memory") {
  auto file = VersionFile::Open("");
  REQUIRE(file.ok());
  REQUIRE((*file)->Save("m", 2).ok());
  CHECK((*file)->Highest("m") == 2);
}

}  // namespace
}  // namespace weightd
