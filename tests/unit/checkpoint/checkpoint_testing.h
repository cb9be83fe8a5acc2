// Files as a writer that may lie makes them.
#pragma once

#include <stdlib.h>

#include <catch2/catch.hpp>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

#include "daemon/base/status.h"

namespace weightd::test {

/// Eight bytes of length, then `header`, then `data_bytes` bytes of data.
inline std::string File(uint64_t length, std::string_view header, size_t data_bytes) {
  std::string file;
  for (int i = 0; i < 8; ++i) file += static_cast<char>(length >> (8 * i) & 0xff);
  file += header;
  for (size_t i = 0; i < data_bytes; ++i) file += static_cast<char>('a' + i % 26);
  return file;
}

/// The same with the header's true length.
inline std::string File(std::string_view header, size_t data_bytes) {
  return File(header.size(), header, data_bytes);
}

/// A directory that vanishes with the test.
class Folder {
 public:
  Folder() {
    std::string pattern =
        (std::filesystem::temp_directory_path() / "weightd-checkpoint-XXXXXX").string();
    REQUIRE(::mkdtemp(pattern.data()) != nullptr);
    path_ = pattern;
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  void Write(const std::string& name, std::string_view text) const {
    std::filesystem::create_directories((path_ / name).parent_path());
    std::ofstream(path_ / name, std::ios::binary) << text;
  }
  void Link(const std::string& target, const std::string& name) const {
    std::filesystem::create_directories((path_ / name).parent_path());
    std::filesystem::create_symlink(target, path_ / name);
  }
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

/// Checks that an error says everything a user needs.
inline void CheckRefused(const Status& status, std::string_view reason, std::string_view tensor,
                         std::string_view text) {
  INFO(Message(status));
  REQUIRE_FALSE(status.ok());
  const ErrorFields fields = FieldsOf(status);
  CHECK(fields.reason == reason);
  CHECK(fields.tensor == tensor);
  CHECK_FALSE(fields.remedy.empty());
  CHECK(Message(status).find(text) != std::string::npos);
}

}  // namespace weightd::test
