// Names and links that lead out of the checkpoint's directory, and those of Hugging Face's cache.
#include "client/checkpoint/folder.h"

#include <sys/stat.h>

#include <catch2/catch.hpp>

#include "tests/unit/checkpoint/checkpoint_testing.h"

namespace weightd {
namespace {

using test::CheckRefused;
using test::Folder;

Status OpenIn(const std::string& directory, const std::string& name) {
  const auto folder = CheckpointFolder::Open(directory);
  REQUIRE(folder.ok());
  return folder->OpenFile(name).status();
}

TEST_CASE("files, files of subfolders and links that stay inside are opened") {
  const Folder folder;
  folder.Write("model/a", "1");
  folder.Write("model/parts/b", "2");
  folder.Link("parts/b", "model/link");
  folder.Link("../a", "model/parts/up");
  for (const char* name : {"a", "parts/b", "link", "parts/up", "parts/../a"}) {
    INFO(name);
    CHECK(OpenIn(folder / "model", name).ok());
  }
  folder.Link("model", "elsewhere");
  CHECK(OpenIn(folder / "elsewhere", "a").ok());  // the directory's own path may be a link
}

TEST_CASE("names that leave the directory are refused") {
  const Folder folder;
  folder.Write("secret", "1");
  folder.Write("model/a", "1");
  for (const std::string& name :
       {std::string("../secret"), folder / "secret", std::string("/etc/passwd")}) {
    CheckRefused(OpenIn(folder / "model", name), reason::kCheckpoint, "", "leads out of");
  }
  for (const std::string& name : {std::string(), std::string("a\0b", 3)}) {
    CheckRefused(OpenIn(folder / "model", name), reason::kCheckpoint, "", "not a file name");
  }
}

TEST_CASE("links that leave the directory are refused, also over a folder") {
  const Folder folder;
  folder.Write("secret/a", "1");
  folder.Write("model/b", "1");
  folder.Link("../secret/a", "model/relative");
  folder.Link(folder / "secret/a", "model/absolute");
  folder.Link("relative", "model/twice");
  folder.Link("../secret", "model/parts");
  folder.Link("/proc/self/environ", "model/proc");
  for (const char* name : {"relative", "absolute", "twice", "parts/a", "proc"}) {
    INFO(name);
    CheckRefused(OpenIn(folder / "model", name), reason::kCheckpoint, "", "leads out of");
  }
}

TEST_CASE("what is missing, dangling or no file is told apart") {
  const Folder folder;
  folder.Write("model/sub/a", "1");
  folder.Link("nothing", "model/dangling");
  folder.Link("loop", "model/loop");
  REQUIRE(::mkfifo((folder / "model/pipe").c_str(), 0600) == 0);
  CHECK(OpenIn(folder / "model", "none").code() == StatusCode::kNotFound);
  CheckRefused(OpenIn(folder / "model", "none"), reason::kCheckpoint, "", "no file none in");
  CheckRefused(OpenIn(folder / "model", "dangling"), reason::kCheckpoint, "", "does not exist");
  CheckRefused(OpenIn(folder / "model", "loop"), reason::kCheckpoint, "", "cannot open loop");
  CheckRefused(OpenIn(folder / "model", "sub"), reason::kCheckpoint, "", "not a regular file");
  CheckRefused(OpenIn(folder / "model", "pipe"), reason::kCheckpoint, "", "not a regular file");
  CheckRefused(CheckpointFolder::Open(folder / "none").status(), reason::kCheckpoint, "",
               "cannot read the checkpoint's directory");
  CheckRefused(CheckpointFolder::Open(folder / "model/sub/a").status(), reason::kCheckpoint, "",
               "cannot read the checkpoint's directory");
}

TEST_CASE("links of a Hugging Face cache may lead to blobs beside snapshots, and no further") {
  const Folder folder;
  folder.Write("hub/models--o--m/blobs/0123", "weights");
  folder.Write("hub/models--o--m/refs/main", "abc");
  folder.Write("hub/models--o--other/blobs/4567", "others");
  folder.Write("secret", "1");
  folder.Link("../../blobs/0123", "hub/models--o--m/snapshots/abc/model.safetensors");
  folder.Link("../../../blobs/0123", "hub/models--o--m/snapshots/abc/sub/deep");
  folder.Link("../../../models--o--other/blobs/4567", "hub/models--o--m/snapshots/abc/other");
  folder.Link("../../../../secret", "hub/models--o--m/snapshots/abc/out");
  folder.Link(folder / "hub/models--o--m/blobs/0123", "hub/models--o--m/snapshots/abc/absolute");
  const std::string snapshot = folder / "hub/models--o--m/snapshots/abc";
  CHECK(OpenIn(snapshot, "model.safetensors").ok());
  CHECK(OpenIn(snapshot, "sub/deep").ok());
  CHECK(OpenIn(snapshot + "/", "model.safetensors").ok());
  for (const char* name : {"other", "out", "absolute", "../../blobs/0123", "../../refs/main"}) {
    INFO(name);
    CheckRefused(OpenIn(snapshot, name), reason::kCheckpoint, "", "leads out of");
  }
}

TEST_CASE("a folder that is merely called snapshots changes nothing") {
  const Folder folder;
  folder.Write("x/other/0123", "weights");
  folder.Link("../../other/0123", "x/snapshots/abc/file");
  CheckRefused(OpenIn(folder / "x/snapshots/abc", "file"), reason::kCheckpoint, "", "leads out of");
}

}  // namespace
}  // namespace weightd
