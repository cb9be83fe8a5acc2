// Directories whose files do not fit each other.
#include "client/checkpoint/checkpoint.h"

#include <catch2/catch.hpp>
#include <cstring>
#include <filesystem>

#include "tests/unit/checkpoint/checkpoint_testing.h"

namespace weightd {
namespace {

using test::CheckRefused;
using test::File;
using test::Folder;

constexpr char kConfig[] = R"({"architectures": ["LlamaForCausalLM"], "hidden_size": 4})";
constexpr char kIndex[] = "model.safetensors.index.json";

// A file of one tensor of four bytes.
std::string OneTensor(const std::string& name) {
  return File("{\"" + name + R"(":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 4);
}

void WriteSharded(const Folder& folder) {
  folder.Write("config.json", kConfig);
  folder.Write("one.safetensors", OneTensor("a"));
  folder.Write("two.safetensors", OneTensor("b"));
  folder.Write(kIndex, R"({"metadata": {"total_size": 8},
                           "weight_map": {"b": "two.safetensors", "a": "one.safetensors"}})");
}

TEST_CASE("a single file and a sharded directory are read where they lie") {
  const Folder single;
  single.Write("config.json", kConfig);
  single.Write("model.safetensors", OneTensor("w"));
  const auto one = Checkpoint::Open(single.path());
  INFO(one.status().ToString());
  REQUIRE(one.ok());
  CHECK(one->architectures() == std::vector<std::string>{"LlamaForCausalLM"});
  REQUIRE(one->tensors().size() == 1);
  CHECK(std::memcmp(one->tensors()[0].address, "abcd", 4) == 0);
  one->ReleasePages();
  CHECK(std::memcmp(one->tensors()[0].address, "abcd", 4) == 0);

  const Folder sharded;
  WriteSharded(sharded);
  const auto two = Checkpoint::Open(sharded.path());
  INFO(two.status().ToString());
  REQUIRE(two.ok());
  REQUIRE(two->tensors().size() == 2);
  CHECK(two->tensors()[0].info.name == "a");
  CHECK(two->tensors()[1].info.name == "b");
  CHECK(two->tensors()[1].file == 1);
  CHECK(two->size_bytes() == 8);
}

TEST_CASE("a checkpoint of Hugging Face's cache is read through its links") {
  const Folder folder;
  folder.Write("m/blobs/1", kConfig);
  folder.Write("m/blobs/2", OneTensor("w"));
  folder.Link("../../blobs/1", "m/snapshots/r/config.json");
  folder.Link("../../blobs/2", "m/snapshots/r/model.safetensors");
  CHECK(Checkpoint::Open(folder / "m/snapshots/r").ok());
  std::filesystem::remove(folder / "m/blobs/2");
  CheckRefused(Checkpoint::Open(folder / "m/snapshots/r").status(), reason::kCheckpoint, "",
               "a link to a file that does not exist");
}

TEST_CASE("missing files are named") {
  const Folder folder;
  CheckRefused(Checkpoint::Open(folder.path()).status(), reason::kCheckpoint, "",
               "no file config.json in " + folder.path());
  folder.Write("config.json", kConfig);
  CheckRefused(Checkpoint::Open(folder.path()).status(), reason::kCheckpoint, "",
               "neither model.safetensors.index.json nor model.safetensors");
  WriteSharded(folder);
  std::filesystem::remove(folder / "two.safetensors");
  CheckRefused(Checkpoint::Open(folder.path()).status(), reason::kCheckpoint, "b",
               "no file two.safetensors in " + folder.path());
}

TEST_CASE("a config.json that is no config is refused") {
  const Folder folder;
  folder.Write("model.safetensors", OneTensor("w"));
  for (const char* text : {"", "[]", "{", "{\"a\": \"\xff\"}"}) {
    folder.Write("config.json", text);
    CheckRefused(Checkpoint::Open(folder.path()).status(), reason::kCheckpoint, "",
                 "config.json is not a JSON object");
  }
  for (const char* text : {"{}", R"({"architectures": []})", R"({"architectures": "Llama"})"}) {
    folder.Write("config.json", text);
    CheckRefused(Checkpoint::Open(folder.path()).status(), reason::kConfig, "",
                 "names no architecture");
  }
}

TEST_CASE("an index that is malformed is refused") {
  const Folder folder;
  WriteSharded(folder);
  for (const char* text :
       {"{}", R"({"weight_map": {}})", R"({"weight_map": ["a"]})", R"({"weight_map": {"a": 1}})"}) {
    folder.Write(kIndex, text);
    CheckRefused(Checkpoint::Open(folder.path()).status(), reason::kCheckpoint, "",
                 "has no weight_map");
  }
  folder.Write(kIndex, R"({"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}})");
  CheckRefused(Checkpoint::Open(folder.path()).status(), reason::kDuplicateTensor, "a", "twice");
}

TEST_CASE("an index that names files outside of the directory is refused with the tensor") {
  const Folder folder;
  folder.Write("secret.safetensors", OneTensor("a"));
  folder.Write("m/config.json", kConfig);
  for (const std::string& name :
       {std::string("../secret.safetensors"), folder / "secret.safetensors"}) {
    folder.Write("m/" + std::string(kIndex), R"({"weight_map": {"a": ")" + name + R"("}})");
    CheckRefused(Checkpoint::Open(folder / "m").status(), reason::kCheckpoint, "a", "leads out of");
  }
  folder.Write("m/" + std::string(kIndex), R"({"weight_map": {"a": "link.safetensors"}})");
  folder.Link("../secret.safetensors", "m/link.safetensors");
  CheckRefused(Checkpoint::Open(folder / "m").status(), reason::kCheckpoint, "a", "leads out of");
}

TEST_CASE("index and files must list the same tensors") {
  const Folder folder;
  WriteSharded(folder);
  folder.Write("two.safetensors", OneTensor("c"));
  CheckRefused(Checkpoint::Open(folder.path()).status(), reason::kMissingTensor, "b",
               "holds a tensor that it does not hold: b");
  folder.Write(kIndex, R"({"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}})");
  CHECK(Checkpoint::Open(folder.path()).ok());
  folder.Write("two.safetensors", File(R"({"c":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                                       R"("a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
                                       4));
  CheckRefused(Checkpoint::Open(folder.path()).status(), reason::kUnknownTensor, "a",
               "two.safetensors holds a tensor that");
}

TEST_CASE("a stale single file beside an index is refused") {
  const Folder folder;
  WriteSharded(folder);
  folder.Write("model.safetensors", OneTensor("w"));
  CheckRefused(Checkpoint::Open(folder.path()).status(), reason::kCheckpoint, "",
               "lies beside an index that does not name it");
}

TEST_CASE("a lie in one of the files names it") {
  const Folder folder;
  WriteSharded(folder);
  folder.Write("two.safetensors", OneTensor("b") + "x");
  CheckRefused(Checkpoint::Open(folder.path()).status(), reason::kGap, "b",
               folder / "two.safetensors");
}

TEST_CASE("a file that is written to while it is mapped is noticed") {
  const Folder folder;
  WriteSharded(folder);
  const auto checkpoint = Checkpoint::Open(folder.path());
  REQUIRE(checkpoint.ok());
  CHECK(checkpoint->CheckUnchanged().ok());
  std::filesystem::last_write_time(folder / "two.safetensors",
                                   std::filesystem::file_time_type::clock::now());
  CheckRefused(checkpoint->CheckUnchanged(), reason::kCheckpoint, "", folder / "two.safetensors");
}

}  // namespace
}  // namespace weightd
