// host.cpp: buffers of global memory, and what the host does with them.
#include "block.hpp"

namespace emulator {

namespace {
std::vector<std::unique_ptr<Memory>> buffers;

// An address in global memory consists of TAG, the number of the buffer, and the offset from the middle of a range. So it is no valid
// pointer of this process, and an index that is somewhat too small or too large still belongs to its buffer.
constexpr u64 TAG = 0x5a5aull << 48;
constexpr u64 TAG_MASK = 0xffffull << 48;
constexpr u32 OFFSET_BITS = 34;
constexpr u64 MIDDLE = 1ull << (OFFSET_BITS - 1);

std::string host_range(Place at, u64 count) {
    if (at.memory == nullptr) return "not an address of a buffer";
    if (at.offset < 0 || static_cast<u64>(at.offset) + count > at.memory->bytes.size())
        return std::to_string(count) + " bytes at offset " + std::to_string(at.offset) + " of `" + at.memory->name +
               "` are out of bounds, it has " + std::to_string(at.memory->bytes.size());
    return {};
}
} // namespace

Place find(u64 address) {
    if ((address & TAG_MASK) != TAG) return {};
    u64 number = (address & ~TAG_MASK) >> OFFSET_BITS;
    if (number >= buffers.size() || buffers[number] == nullptr) return {};
    return {buffers[number].get(), static_cast<i64>(address & ((1ull << OFFSET_BITS) - 1)) - static_cast<i64>(MIDDLE)};
}

u64 allocate(const std::string& name, u64 bytes) {
    auto memory = std::make_unique<Memory>();
    memory->name = name;
    memory->resize(bytes);
    buffers.push_back(std::move(memory));
    return TAG | (buffers.size() - 1) << OFFSET_BITS | MIDDLE;
}

std::string release(u64 address) {
    Place at = find(address);
    if (at.memory == nullptr || at.offset != 0) return "not the address of a buffer";
    buffers[(address & ~TAG_MASK) >> OFFSET_BITS].reset();
    return {};
}

std::string upload(u64 address, const unsigned char* bytes, u64 count) {
    Place at = find(address);
    if (std::string error = host_range(at, count); !error.empty()) return error;
    std::copy(bytes, bytes + count, at.memory->bytes.begin() + at.offset);
    const u64 odd = static_cast<u64>(at.offset) % CELL_BYTES;
    at.offset -= static_cast<i64>(odd);
    each_cell(at, count + odd, true, [](Cell& cell) {
        cell = {};
        cell.writer.serial = 1;
    });
    return {};
}

std::string download(u64 address, u64 count, std::vector<unsigned char>& bytes) {
    Place at = find(address);
    if (std::string error = host_range(at, count); !error.empty()) return error;
    bytes.assign(at.memory->bytes.begin() + at.offset, at.memory->bytes.begin() + at.offset + static_cast<i64>(count));
    return {};
}

} // namespace emulator
