// The SIGBUS handler of mapping.h: a list of address ranges in which a fault is survived.
#pragma once

#include <cstddef>
#include <cstdint>

namespace weightd::sigbus_guard {

/// Adds a range and installs the handler on first use. Returns the range's entry, nullptr if there
/// is no memory for it. A fault inside replaces the whole range by private zero pages and marks the
/// entry lost; a fault elsewhere takes the action that was installed before.
/// Thread safety: any thread.
void* Add(std::byte* begin, uint64_t size_bytes);

/// Removes the range. Call before unmapping it.
void Remove(void* entry);

/// True if a fault has happened in the range.
bool Lost(const void* entry);

}  // namespace weightd::sigbus_guard
