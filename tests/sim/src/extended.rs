//! The extended registers (x87, SSE, AVX, AVX-512) as XSAVE sees them.
//!
//! SDM 13.4 "XSAVE Area", 13.7 "Operation of XSAVE", 13.8 "Operation of
//! XRSTOR"; standard form only.
// UNSAFETY: XSAVE and XRSTOR take raw pointers.
#![expect(unsafe_code)]

use crate::profile::Profile;

const LEGACY: usize = 512;
const HEADER: usize = 64;
const MXCSR_AT: usize = 24;
const XMM_AT: usize = 160;
/// MXCSR bits that exist.
const MXCSR_MASK: u32 = 0xffff;

/// The registers, laid out as a standard-form area without its header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Extended {
    bytes: Vec<u8>,
}

/// The reset values of the legacy region: FCW 0x37f, MXCSR 0x1f80.
fn reset_legacy() -> [u8; LEGACY] {
    let mut legacy = [0; LEGACY];
    legacy[0] = 0x7f;
    legacy[1] = 0x03;
    legacy[MXCSR_AT] = 0x80;
    legacy[MXCSR_AT + 1] = 0x1f;
    legacy
}

impl Extended {
    /// Registers filled with one byte, as a host program may leave them.
    pub(crate) fn pattern(profile: &Profile, byte: u8) -> Self {
        let mut bytes = vec![byte; profile.xsave_size(profile.xcr0_supported)];
        bytes[..XMM_AT].copy_from_slice(&reset_legacy()[..XMM_AT]);
        Self { bytes }
    }

    /// An XMM register.
    pub(crate) fn xmm(&self, index: usize) -> u128 {
        let at = XMM_AT + index * 16;
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&self.bytes[at..at + 16]);
        u128::from_le_bytes(bytes)
    }

    /// Sets an XMM register.
    pub(crate) fn set_xmm(&mut self, index: usize, value: u128) {
        let at = XMM_AT + index * 16;
        self.bytes[at..at + 16].copy_from_slice(&value.to_le_bytes());
    }

    /// The upper half of a YMM register.
    pub(crate) fn ymm_high(&self, index: usize) -> u128 {
        let at = LEGACY + HEADER + index * 16;
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&self.bytes[at..at + 16]);
        u128::from_le_bytes(bytes)
    }

    /// Sets the upper half of a YMM register.
    pub(crate) fn set_ymm_high(&mut self, index: usize, value: u128) {
        let at = LEGACY + HEADER + index * 16;
        self.bytes[at..at + 16].copy_from_slice(&value.to_le_bytes());
    }

    /// FXSAVE.
    ///
    /// # Safety
    /// `area` is 512 writable bytes.
    pub(crate) unsafe fn fxsave(&self, area: *mut u8) {
        // SAFETY: the caller's contract.
        unsafe { area.copy_from_nonoverlapping(self.bytes.as_ptr(), LEGACY) };
        let mask = area.wrapping_add(28);
        // SAFETY: within the legacy region.
        unsafe { mask.copy_from_nonoverlapping(MXCSR_MASK.to_le_bytes().as_ptr(), 4) };
    }

    /// FXRSTOR; false if it raises #GP.
    ///
    /// # Safety
    /// `area` is 512 readable bytes.
    pub(crate) unsafe fn fxrstor(&mut self, area: *const u8) -> bool {
        let mut legacy = [0; LEGACY];
        // SAFETY: the caller's contract.
        unsafe { area.copy_to_nonoverlapping(legacy.as_mut_ptr(), LEGACY) };
        if mxcsr(&legacy) & !MXCSR_MASK != 0 {
            return false;
        }
        self.bytes[..LEGACY].copy_from_slice(&legacy);
        true
    }

    /// XSAVE.
    ///
    /// # Safety
    /// `area` is as large as the components in `mask & xcr0` want.
    pub(crate) unsafe fn xsave(&self, profile: &Profile, area: *mut u8, mask: u64, xcr0: u64) {
        let wanted = mask & xcr0;
        if wanted & 3 != 0 {
            // SAFETY: the legacy region is part of every area.
            unsafe { self.fxsave(area) };
        }
        let header = area.wrapping_add(LEGACY).cast::<u64>();
        // SAFETY: the header is part of every area and 64-byte aligned.
        let old = unsafe { header.read() };
        let present = (old & !mask) | wanted;
        // SAFETY: as above.
        unsafe { header.write(present) };
        for c in &profile.components {
            if wanted >> c.bit & 1 != 0 {
                let to = area.wrapping_add(c.offset);
                let from = &self.bytes[c.offset..c.offset + c.size];
                // SAFETY: the caller's area holds the component.
                unsafe { to.copy_from_nonoverlapping(from.as_ptr(), c.size) };
            }
        }
    }

    /// XRSTOR; an error if it raises #GP.
    ///
    /// # Safety
    /// `area` is as large as the components in `mask & xcr0` want.
    pub(crate) unsafe fn xrstor(
        &mut self,
        profile: &Profile,
        area: *const u8,
        mask: u64,
        xcr0: u64,
    ) -> Result<(), &'static str> {
        let mut header = [0u64; 8];
        let from = area.wrapping_add(LEGACY).cast::<u64>();
        // SAFETY: the header is part of every area and 64-byte aligned.
        unsafe { from.copy_to_nonoverlapping(header.as_mut_ptr(), 8) };
        let present = header[0];
        if header[1..].iter().any(|word| *word != 0) {
            return Err("XRSTOR: XCOMP_BV or a reserved header byte is not 0");
        }
        if present & !xcr0 != 0 {
            return Err("XRSTOR: XSTATE_BV has a component that XCR0 has not");
        }
        let wanted = mask & xcr0;
        let mut legacy = reset_legacy();
        if wanted & 3 != 0 {
            let mut given = [0; LEGACY];
            // SAFETY: the legacy region is part of every area.
            unsafe { area.copy_to_nonoverlapping(given.as_mut_ptr(), LEGACY) };
            // MXCSR is taken with SSE or AVX whatever XSTATE_BV says.
            if wanted & 6 != 0 && mxcsr(&given) & !MXCSR_MASK != 0 {
                return Err("XRSTOR: reserved bits of MXCSR");
            }
            if present & 1 != 0 {
                legacy[..MXCSR_AT].copy_from_slice(&given[..MXCSR_AT]);
                legacy[32..XMM_AT].copy_from_slice(&given[32..XMM_AT]);
            }
            if wanted & 1 != 0 {
                self.bytes[..MXCSR_AT].copy_from_slice(&legacy[..MXCSR_AT]);
                self.bytes[32..XMM_AT].copy_from_slice(&legacy[32..XMM_AT]);
            }
            if wanted & 2 != 0 {
                self.bytes[MXCSR_AT..32].copy_from_slice(&given[MXCSR_AT..32]);
                if present & 2 != 0 {
                    legacy[XMM_AT..416].copy_from_slice(&given[XMM_AT..416]);
                }
                self.bytes[XMM_AT..416].copy_from_slice(&legacy[XMM_AT..416]);
            }
        }
        for c in &profile.components {
            if wanted >> c.bit & 1 == 0 {
                continue;
            }
            let to = &mut self.bytes[c.offset..c.offset + c.size];
            if present >> c.bit & 1 != 0 {
                let from = area.wrapping_add(c.offset);
                // SAFETY: the caller's area holds the component.
                unsafe { from.copy_to_nonoverlapping(to.as_mut_ptr(), c.size) };
            } else {
                to.fill(0);
            }
        }
        Ok(())
    }
}

fn mxcsr(legacy: &[u8; LEGACY]) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&legacy[MXCSR_AT..MXCSR_AT + 4]);
    u32::from_le_bytes(bytes)
}
