//! The extended registers: x87, SSE, AVX, AVX-512, and XCR0.
//!
//! The whole state of guest and host is switched, never only part of a
//! register. The guest's lives in an XSAVE area of the standard format (SDM
//! 13.4 "XSAVE Area"); between two loans the area is the truth.
// UNSAFETY: XSAVE, XRSTOR, XSETBV, and byte access to the area they use.
#![expect(unsafe_code)]

use abi::vcpu_state::FxLayout;
use zerocopy::IntoBytes;

use crate::arch::addr::PAGE_SIZE;
use crate::arch::reg::{Cr4, Xcr0};
use crate::cpu::Cpu;
use crate::fallible::NoMemory;
use crate::host::{Host, OwnedPage};

/// Components that a guest can be given.
const POSSIBLE: Xcr0 = Xcr0::X87
    .union(Xcr0::SSE)
    .union(Xcr0::AVX)
    .union(Xcr0::OPMASK)
    .union(Xcr0::ZMM_HI256)
    .union(Xcr0::HI16_ZMM);
const AVX512: Xcr0 = Xcr0::OPMASK.union(Xcr0::ZMM_HI256).union(Xcr0::HI16_ZMM);

/// Offsets in the area: SDM 13.4.1 "Legacy Region of an XSAVE Area", 13.4.2
/// "XSAVE Header".
const FCW: usize = 0;
const FSW: usize = 2;
const FTW: usize = 4;
const ST: usize = 32;
const MXCSR: usize = 24;
const XMM: usize = 160;
const XSTATE_BV: usize = 512;
/// The status word's ES and TOP: SDM 1 8.1.3 "x87 FPU Status Register".
const FSW_ES: u16 = 1 << 7;
const FSW_TOP: u16 = 7 << 11;
/// Values after FNINIT and reset, as HAXM's vCPUs start.
const FCW_RESET: u16 = 0x37f;
const MXCSR_RESET: u32 = 0x1f80;

/// The components that this host lets a guest use, as XCR0 bits; 0 without XSAVE.
#[must_use]
pub fn available(cpu: &impl Cpu) -> Xcr0 {
    if cpu.cr4() & Cr4::OSXSAVE.bits() == 0 {
        return Xcr0::empty();
    }
    // SAFETY: CR4.OSXSAVE is set.
    let host = Xcr0::from_bits_retain(unsafe { cpu.xcr0() });
    let mut mask = host & POSSIBLE;
    for bit in 2..8u32 {
        let component = Xcr0::from_bits_retain(1 << bit);
        if mask.contains(component) {
            // SDM 13.2 "Enumeration of CPU Support for XSAVE Instructions ...".
            let place = cpu.cpuid(0xd, bit);
            let end = u64::from(place.ebx).saturating_add(u64::from(place.eax));
            if end > PAGE_SIZE {
                mask.remove(component);
            }
        }
    }
    if !mask.contains(AVX512) {
        mask.remove(AVX512);
    }
    mask
}

/// A guest's extended registers.
pub struct Extended<H: Host> {
    area: OwnedPage<H>,
    /// Components saved and restored; empty without XSAVE on the host.
    components: Xcr0,
    /// Where the upper halves of the YMM registers are in the area.
    ymm_offset: usize,
    /// Where bits 511:256 of ZMM0-15 are.
    zmm_offset: usize,
    /// Where ZMM16-31 and the opmask registers are.
    hi16_offset: usize,
    opmask_offset: usize,
    /// The guest's XCR0.
    xcr0: u64,
    /// The host's XCR0: a host sets it once, and on all processors alike.
    host_xcr0: u64,
    /// What is in force, the host's but in the guest's turn.
    in_force: u64,
    loaded: bool,
}

/// The bits of MXCSR there are: SDM 1 12.6.6 "Guidelines for Writing to the
/// MXCSR Register".
fn mxcsr_mask(image: &FxLayout) -> u32 {
    match image.mxcsr_mask {
        0 => 0xffbf,
        mask => mask & 0xffff,
    }
}

impl<H: Host> Extended<H> {
    /// Registers as after reset.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub fn new(host: &H) -> Result<Self, NoMemory> {
        let components = available(host.cpu());
        let host_xcr0 = if components.is_empty() {
            0
        } else {
            // SAFETY: components are only there if CR4.OSXSAVE is set.
            unsafe { host.cpu().xcr0() }
        };
        // SDM 13.2: EBX of leaf 0xD, subleaf n, is the offset of component n.
        let offset = |component| host.cpu().cpuid(0xd, component).ebx as usize;
        let mut this = Self {
            area: OwnedPage::new(host)?,
            components,
            ymm_offset: offset(2),
            zmm_offset: offset(6),
            hi16_offset: offset(7),
            opmask_offset: offset(5),
            xcr0: Xcr0::X87.bits(),
            host_xcr0,
            in_force: host_xcr0,
            loaded: false,
        };
        this.put(FCW, &FCW_RESET.to_le_bytes());
        this.put(MXCSR, &MXCSR_RESET.to_le_bytes());
        this.mark_legacy();
        Ok(this)
    }

    #[inline(never)]
    fn put(&mut self, offset: usize, bytes: &[u8]) {
        for (i, byte) in bytes.iter().enumerate() {
            let at = offset.wrapping_add(i);
            if at < PAGE_SIZE as usize {
                let to = self.area.pointer().wrapping_add(at);
                // SAFETY: inside the page, which only this vCPU uses, and the
                // processor only while `loaded` changes.
                unsafe { to.write_volatile(*byte) };
            }
        }
    }

    #[inline(never)]
    fn take(&self, offset: usize, bytes: &mut [u8]) {
        for (i, byte) in bytes.iter_mut().enumerate() {
            let at = offset.wrapping_add(i);
            if at < PAGE_SIZE as usize {
                let from = self.area.pointer().wrapping_add(at);
                // SAFETY: as in `put`.
                *byte = unsafe { from.read_volatile() };
            }
        }
    }

    fn in_use(&self) -> u64 {
        let mut bytes = [0; 8];
        self.take(XSTATE_BV, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Tells XRSTOR to take x87 and SSE from the area.
    fn mark_legacy(&mut self) {
        if !self.components.is_empty() {
            let bits = self.in_use() | (Xcr0::X87 | Xcr0::SSE).bits();
            self.put(XSTATE_BV, &bits.to_le_bytes());
        }
    }

    /// Gives the processor the guest's registers, in the guest's turn.
    #[inline]
    pub fn load(&mut self, cpu: &H::Cpu, osxsave: bool) {
        // SAFETY: the area is a page of ours; its header came from XSAVE or
        // from `mark_legacy`, its MXCSR is masked in `set_fx`.
        unsafe { cpu.xrstor(self.area.pointer(), self.components.bits()) };
        self.loaded = true;
        self.apply_xcr0(cpu, osxsave);
    }

    /// Gives the processor back to the host, in the guest's turn.
    #[inline]
    pub fn save(&mut self, cpu: &H::Cpu) {
        self.apply_xcr0(cpu, false);
        self.loaded = false;
        // SAFETY: the area is a page of ours, and `available` checked that the
        // components fit.
        unsafe { cpu.xsave(self.area.pointer(), self.components.bits()) };
    }

    /// Puts the XCR0 in force that the guest should see: its own while its
    /// CR4.OSXSAVE is set, the host's otherwise.
    #[inline]
    pub fn apply_xcr0(&mut self, cpu: &H::Cpu, osxsave: bool) {
        if !self.loaded || self.components.is_empty() {
            return;
        }
        let wanted = if osxsave { self.xcr0 } else { self.host_xcr0 };
        if self.in_force != wanted {
            self.in_force = wanted;
            // SAFETY: `set_xcr0` checked the value; `save` puts the host's
            // back. Components are only there if CR4.OSXSAVE is set.
            unsafe { cpu.set_xcr0(wanted) };
        }
    }

    /// The guest's XCR0.
    pub fn xcr0(&self) -> u64 {
        self.xcr0
    }

    /// Sets the guest's XCR0; `false` if the value is not allowed: SDM 2.6
    /// "Extended Control Registers (Including XCR0)". `allowed` is what the
    /// guest's CPUID offers.
    pub fn set_xcr0(&mut self, value: u64, allowed: u64) -> bool {
        let bits = Xcr0::from_bits_retain(value);
        let avx512 = bits.intersection(AVX512);
        let fits = value & !(allowed & self.components.bits()) == 0
            && bits.contains(Xcr0::X87)
            && (!bits.contains(Xcr0::AVX) || bits.contains(Xcr0::SSE))
            && (avx512.is_empty() || (avx512 == AVX512 && bits.contains(Xcr0::AVX)));
        if fits {
            self.xcr0 = value;
        }
        fits
    }

    /// The x87 and SSE registers as FXSAVE lays them out. Not while loaded.
    pub fn fx(&self) -> FxLayout {
        let mut image = FxLayout::default();
        self.take(0, image.as_mut_bytes());
        image
    }

    /// Sets the x87 and SSE registers. Reserved MXCSR bits are dropped: they
    /// would make XRSTOR fault (SDM 10.5.1.2 "SSE State"). Not while loaded.
    pub fn set_fx(&mut self, image: &FxLayout) {
        let mut image = *image;
        image.mxcsr &= mxcsr_mask(&image);
        if let Some(bytes) = image.as_bytes().get(..416) {
            self.put(0, bytes);
        }
        self.mark_legacy();
    }

    /// Sets MXCSR; `false`, and nothing, if a bit is reserved. Not while loaded.
    pub fn set_mxcsr(&mut self, value: u32) -> bool {
        let mut image = self.fx();
        let fits = value & !mxcsr_mask(&image) == 0;
        if fits {
            image.mxcsr = value;
            self.set_fx(&image);
        }
        fits
    }

    /// Reads a piece of a component; zeros if it is in its initial state.
    #[inline(never)]
    fn take_component(&self, component: Xcr0, offset: usize, bytes: &mut [u8]) {
        if self.in_use() & component.bits() != 0 {
            self.take(offset, bytes);
        }
    }

    /// Writes a piece of a component of `length` bytes at `start`. In its initial
    /// state it is zero, and the area may hold old bytes there.
    fn put_component(
        &mut self,
        component: Xcr0,
        (start, length): (usize, usize),
        offset: usize,
        bytes: &[u8],
    ) {
        if !self.components.contains(component) {
            return;
        }
        let in_use = self.in_use();
        if in_use & component.bits() == 0 {
            if bytes.iter().all(|byte| *byte == 0) {
                return;
            }
            for at in 0..length {
                self.put(start.wrapping_add(at), &[0]);
            }
            let bits = in_use | component.bits();
            self.put(XSTATE_BV, &bits.to_le_bytes());
        }
        self.put(start.wrapping_add(offset), bytes);
    }

    /// A vector register, 0 to 31; bits the processor lacks are zero. Not while
    /// loaded.
    pub fn vector(&self, index: u8) -> [u8; 64] {
        let mut value = [0; 64];
        let index = usize::from(index & 31);
        if let Some(high) = index.checked_sub(16) {
            let at = self.hi16_offset.wrapping_add(high.wrapping_mul(64));
            self.take_component(Xcr0::HI16_ZMM, at, &mut value);
            return value;
        }
        let (low, rest) = value.split_at_mut(16);
        let (middle, high) = rest.split_at_mut(16);
        let at = index.wrapping_mul(16);
        self.take(XMM.wrapping_add(at), low);
        self.take_component(Xcr0::AVX, self.ymm_offset.wrapping_add(at), middle);
        let at = self.zmm_offset.wrapping_add(index.wrapping_mul(32));
        self.take_component(Xcr0::ZMM_HI256, at, high);
        value
    }

    /// Sets a vector register, all of it. Not while loaded.
    pub fn set_vector(&mut self, index: u8, value: &[u8; 64]) {
        let index = usize::from(index & 31);
        if let Some(high) = index.checked_sub(16) {
            let place = (self.hi16_offset, 1024);
            self.put_component(Xcr0::HI16_ZMM, place, high.wrapping_mul(64), value);
            return;
        }
        let (low, rest) = value.split_at(16);
        let (middle, high) = rest.split_at(16);
        let at = index.wrapping_mul(16);
        self.put(XMM.wrapping_add(at), low);
        self.mark_legacy();
        self.put_component(Xcr0::AVX, (self.ymm_offset, 256), at, middle);
        let at = index.wrapping_mul(32);
        self.put_component(Xcr0::ZMM_HI256, (self.zmm_offset, 512), at, high);
    }

    /// An opmask register, 0 to 7. Not while loaded.
    pub fn opmask(&self, index: u8) -> u64 {
        let mut bytes = [0; 8];
        let at = usize::from(index & 7).wrapping_mul(8);
        self.take_component(
            Xcr0::OPMASK,
            self.opmask_offset.wrapping_add(at),
            &mut bytes,
        );
        u64::from_le_bytes(bytes)
    }

    /// The x87 status word.
    fn status(&self) -> u16 {
        let mut bytes = [0; 2];
        self.take(FSW, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// An x87 exception waits. Not while loaded.
    pub fn x87_error(&self) -> bool {
        self.status() & FSW_ES != 0
    }

    /// Where MMX register `index` is: it is a physical x87 register, and the area
    /// holds them from the top of the stack on (SDM 1 10.5.1.1 "x87 State").
    fn mmx_offset(&self, index: u8) -> usize {
        let top = (self.status() >> 11) as u8;
        let slot = index.wrapping_sub(top) & 7;
        ST.wrapping_add(usize::from(slot).wrapping_mul(16))
    }

    /// An MMX register, 0 to 7. Not while loaded.
    pub fn mmx(&self, index: u8) -> u64 {
        let mut bytes = [0; 8];
        self.take(self.mmx_offset(index), &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Ends an MMX instruction: the top of the stack is 0 and all registers are
    /// valid. One that was written has an exponent of ones (SDM 3A 13.2 "The MMX
    /// State and MMX Register Aliasing"). Not while loaded.
    pub fn end_mmx(&mut self, write: Option<(u8, u64)>) {
        let mut slots = [[0; 10]; 8];
        for (index, slot) in (0u8..).zip(slots.iter_mut()) {
            self.take(self.mmx_offset(index), slot);
            if let Some((_, value)) = write.filter(|(written, _)| *written == index) {
                let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
                *slot = [a, b, c, d, e, f, g, h, 0xff, 0xff];
            }
        }
        let status = self.status() & !FSW_TOP;
        self.put(FSW, &status.to_le_bytes());
        self.put(FTW, &[0xff]);
        for (index, slot) in slots.iter().enumerate() {
            self.put(ST.wrapping_add(index.wrapping_mul(16)), slot);
        }
        self.mark_legacy();
    }
}
