//! The BSD rule for request numbers: `direction | size << 16 | group << 8 | nr` with group 0.

/// Direction: no argument.
const VOID: u32 = 0x2000_0000;
/// Direction: the caller gets data.
const OUT: u32 = 0x4000_0000;
/// Direction: the caller gives data.
const IN: u32 = 0x8000_0000;

/// Lowest bit of the size field.
const SIZE_SHIFT: u32 = 16;
/// Largest value of the size field.
const SIZE_MASK: u32 = 0x1fff;

const fn encode(direction: u32, size: usize, nr: u32) -> u32 {
    assert!(size <= SIZE_MASK as usize);
    direction | (size as u32) << SIZE_SHIFT | nr
}

pub(super) const fn io(nr: u32) -> u32 {
    encode(VOID, 0, nr)
}

pub(super) const fn ior<T>(nr: u32) -> u32 {
    encode(OUT, size_of::<T>(), nr)
}

pub(super) const fn iow<T>(nr: u32) -> u32 {
    encode(IN, size_of::<T>(), nr)
}

pub(super) const fn iowr<T>(nr: u32) -> u32 {
    encode(IN | OUT, size_of::<T>(), nr)
}

/// Bytes of the argument as the number itself says. The kernel copies that many in and out by itself; 4
/// tells a 32-bit caller's CPUID request.
#[must_use]
pub const fn argument_size(number: u32) -> u32 {
    number >> SIZE_SHIFT & SIZE_MASK
}
