// memory.cuh: the part of instructions.cuh that loads and stores. Include instructions.cuh.
//
// One line of the tables below makes the five functions of one type. For `f32x4` they are:
//   f32x4 ld_shared_f32x4(shared_address)      ld.shared.v4.f32
//   f32x4 ld_global_f32x4(const void*)         ld.global.v4.f32       of what this launch may have written
//   f32x4 ld_global_nc_f32x4(const void*)      ld.global.nc.v4.f32    of what neither this launch nor one before it writes
//   void  st_shared_f32x4(shared_address, f32x4)
//   void  st_global_f32x4(void*, f32x4)
// Addresses are aligned to the size of the value, which is 16 bytes here.
// clang-format off
#pragma once

#define SAMTONE_LOAD(function, type, instruction, address_type, address_register, emulated, ...) \
    SAMTONE_DEVICE type function(address_type address SAMTONE_SITE) {                            \
        type v{};                                                                                \
        SAMTONE_PTX(instruction " " __VA_ARGS__ : address_register(address) : "memory");         \
        SAMTONE_EMULATED_AS(v = emulator::emulated<type>(address, instruction, site));           \
        return v;                                                                                \
    }
#define SAMTONE_STORE(function, type, instruction, address_type, address_register, emulated, ...) \
    SAMTONE_DEVICE void function(address_type address, type v SAMTONE_SITE) {                     \
        SAMTONE_PTX(instruction " " __VA_ARGS__, address_register(address) : "memory");           \
        SAMTONE_EMULATED_AS(emulator::emulated<type>(address, v, instruction, site));             \
    }
#define SAMTONE_ACCESS_1(name, type, ptx, r)                                                                             \
    SAMTONE_LOAD(ld_shared_##name, type, "ld.shared." ptx, shared_address, "r", load_shared, "%0, [%1];" : "=" r(v))     \
    SAMTONE_LOAD(ld_global_##name, type, "ld.global." ptx, const void*, "l", load_global, "%0, [%1];" : "=" r(v))        \
    SAMTONE_LOAD(ld_global_nc_##name, type, "ld.global.nc." ptx, const void*, "l", load_global_nc, "%0, [%1];" : "=" r(v)) \
    SAMTONE_STORE(st_shared_##name, type, "st.shared." ptx, shared_address, "r", store_shared, "[%1], %0;" ::r(v))       \
    SAMTONE_STORE(st_global_##name, type, "st.global." ptx, void*, "l", store_global, "[%1], %0;" ::r(v))
#define SAMTONE_ACCESS_2(name, type, ptx, r)                                                              \
    SAMTONE_LOAD(ld_shared_##name, type, "ld.shared.v2." ptx, shared_address, "r", load_shared,           \
                 "{%0, %1}, [%2];" : "=" r(v.x), "=" r(v.y))                                              \
    SAMTONE_LOAD(ld_global_##name, type, "ld.global.v2." ptx, const void*, "l", load_global,              \
                 "{%0, %1}, [%2];" : "=" r(v.x), "=" r(v.y))                                              \
    SAMTONE_LOAD(ld_global_nc_##name, type, "ld.global.nc.v2." ptx, const void*, "l", load_global_nc,     \
                 "{%0, %1}, [%2];" : "=" r(v.x), "=" r(v.y))                                              \
    SAMTONE_STORE(st_shared_##name, type, "st.shared.v2." ptx, shared_address, "r", store_shared,         \
                  "[%2], {%0, %1};" ::r(v.x), r(v.y))                                                     \
    SAMTONE_STORE(st_global_##name, type, "st.global.v2." ptx, void*, "l", store_global,                  \
                  "[%2], {%0, %1};" ::r(v.x), r(v.y))
#define SAMTONE_ACCESS_4(name, type, ptx, r)                                                              \
    SAMTONE_LOAD(ld_shared_##name, type, "ld.shared.v4." ptx, shared_address, "r", load_shared,           \
                 "{%0, %1, %2, %3}, [%4];" : "=" r(v.x), "=" r(v.y), "=" r(v.z), "=" r(v.w))              \
    SAMTONE_LOAD(ld_global_##name, type, "ld.global.v4." ptx, const void*, "l", load_global,              \
                 "{%0, %1, %2, %3}, [%4];" : "=" r(v.x), "=" r(v.y), "=" r(v.z), "=" r(v.w))              \
    SAMTONE_LOAD(ld_global_nc_##name, type, "ld.global.nc.v4." ptx, const void*, "l", load_global_nc,     \
                 "{%0, %1, %2, %3}, [%4];" : "=" r(v.x), "=" r(v.y), "=" r(v.z), "=" r(v.w))              \
    SAMTONE_STORE(st_shared_##name, type, "st.shared.v4." ptx, shared_address, "r", store_shared,         \
                  "[%4], {%0, %1, %2, %3};" ::r(v.x), r(v.y), r(v.z), r(v.w))                             \
    SAMTONE_STORE(st_global_##name, type, "st.global.v4." ptx, void*, "l", store_global,                  \
                  "[%4], {%0, %1, %2, %3};" ::r(v.x), r(v.y), r(v.z), r(v.w))

SAMTONE_ACCESS_1(u16, u16, "u16", "h")
SAMTONE_ACCESS_1(u32, u32, "u32", "r")
SAMTONE_ACCESS_1(i32, i32, "s32", "r")
SAMTONE_ACCESS_1(f32, float, "f32", "f")
SAMTONE_ACCESS_1(u64, u64, "u64", "l")
SAMTONE_ACCESS_1(i64, i64, "s64", "l")
SAMTONE_ACCESS_1(f64, double, "f64", "d")
SAMTONE_ACCESS_2(u32x2, u32x2, "u32", "r")
SAMTONE_ACCESS_2(f32x2, f32x2, "f32", "f")
SAMTONE_ACCESS_4(u32x4, u32x4, "u32", "r")
SAMTONE_ACCESS_4(f32x4, f32x4, "f32", "f")

// st.global.cs: stores what is read much later, if at all. Caches let it go first.
SAMTONE_STORE(st_global_cs_f32x4, f32x4, "st.global.cs.v4.f32", void*, "l", store_global, "[%4], {%0, %1, %2, %3};" ::"f"(v.x), "f"(v.y),
              "f"(v.z), "f"(v.w))

#undef SAMTONE_ACCESS_1
#undef SAMTONE_ACCESS_2
#undef SAMTONE_ACCESS_4
#undef SAMTONE_LOAD
#undef SAMTONE_STORE

// atom.global: only on integers, because the order in which thread blocks arrive must not change a result. Gives the value before.
SAMTONE_DEVICE u32 atom_global_add_u32(void* address, u32 value SAMTONE_SITE) {
    u32 r = 0;
    SAMTONE_PTX("atom.global.add.u32 %0, [%1], %2;" : "=r"(r) : "l"(address), "r"(value) : "memory");
    SAMTONE_EMULATED_AS(r = emulator::atomic(address, value, emulator::Atomic::add, site));
    return r;
}
SAMTONE_DEVICE u32 atom_global_min_u32(void* address, u32 value SAMTONE_SITE) {
    u32 r = 0;
    SAMTONE_PTX("atom.global.min.u32 %0, [%1], %2;" : "=r"(r) : "l"(address), "r"(value) : "memory");
    SAMTONE_EMULATED_AS(r = emulator::atomic(address, value, emulator::Atomic::min, site));
    return r;
}
// atom.global.inc: adds one, or makes it 0 after `last`. Who gets `last` is the last of last + 1 callers, and the next callers count anew.
SAMTONE_DEVICE u32 atom_global_inc_u32(void* address, u32 last SAMTONE_SITE) {
    u32 r = 0;
    SAMTONE_PTX("atom.global.inc.u32 %0, [%1], %2;" : "=r"(r) : "l"(address), "r"(last) : "memory");
    SAMTONE_EMULATED_AS(r = emulator::atomic(address, last, emulator::Atomic::increment, site));
    return r;
}
SAMTONE_DEVICE u32 atom_global_or_u32(void* address, u32 value SAMTONE_SITE) {
    u32 r = 0;
    SAMTONE_PTX("atom.global.or.b32 %0, [%1], %2;" : "=r"(r) : "l"(address), "r"(value) : "memory");
    SAMTONE_EMULATED_AS(r = emulator::atomic(address, value, emulator::Atomic::bit_or, site));
    return r;
}
