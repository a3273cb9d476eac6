//! The VMCS of a new vCPU: the fields that never change.

use super::Current;
use crate::arch::control::{Primary, Secondary};
use crate::arch::event::vector;
use crate::arch::{addr::Hpa, field};
use crate::caps::{Caps, Counters};
use crate::host::Host;

/// What the fields point to.
pub struct Pointers {
    /// The MSR bitmap.
    pub msr_bitmap: Hpa,
    /// The virtual-APIC page, where the processor has a TPR shadow.
    pub virtual_apic: Option<Hpa>,
    /// The EPT pointer.
    pub eptp: u64,
    /// This vCPU's tag in the TLB, not 0.
    pub vpid: u16,
}

/// Exceptions that always exit: #MC is the host's; endless #DB or #AC would
/// keep the processor from taking interrupts.
pub const ALWAYS_INTERCEPTED: u32 = 1 << vector::MC | 1 << vector::DB | 1 << vector::AC;

/// PAUSEs at most this many TSC ticks apart belong to one spin loop: SDM
/// 25.6.13 "Controls for PAUSE-Loop Exiting". KVM's users have lived with
/// these two figures on every processor since.
const PLE_GAP: u32 = 128;
/// TSC ticks that a loop may spin before it exits.
const PLE_WINDOW: u32 = 4096;

/// The primary controls without interrupt-window exiting.
pub fn primary(caps: &Caps) -> Primary {
    caps.primary.difference(Primary::INTERRUPT_WINDOW_EXITING)
}

/// Writes the controls and everything that stays as it is.
pub fn write_constant<H: Host>(current: &Current<'_, H>, caps: &Caps, pointers: &Pointers) {
    current.put(field::PIN_CONTROLS, caps.pin.bits());
    current.put(field::PRIMARY_CONTROLS, primary(caps).bits());
    if caps.primary.contains(Primary::ACTIVATE_SECONDARY) {
        current.put(field::SECONDARY_CONTROLS, caps.secondary.bits());
    }
    current.put(field::EXIT_CONTROLS, caps.exit.bits());
    current.put(field::ENTRY_CONTROLS, caps.entry.bits());
    current.put(field::EXCEPTION_BITMAP, ALWAYS_INTERCEPTED);
    // With bit 14 of the bitmap clear, mask 0 and match 0 exit on no #PF: SDM
    // 26.2 "Other Causes of VM Exits".
    current.put(field::PAGE_FAULT_ERROR_MASK, 0);
    current.put(field::PAGE_FAULT_ERROR_MATCH, 0);
    current.put(field::CR3_TARGET_COUNT, 0);
    current.put(field::EXIT_MSR_STORE_COUNT, 0);
    current.put(field::EXIT_MSR_LOAD_COUNT, 0);
    current.put(field::ENTRY_MSR_LOAD_COUNT, 0);
    current.put(field::ENTRY_INTERRUPTION_INFO, 0);
    current.put(field::MSR_BITMAPS, pointers.msr_bitmap.0);
    if let Some(page) = pointers.virtual_apic {
        current.put(field::VIRTUAL_APIC_ADDRESS, page.0);
        current.put(field::TPR_THRESHOLD, 0);
    }
    // SDM 25.4.2 "Guest Non-Register State": all ones without VMCS shadowing.
    current.put(field::VMCS_LINK_POINTER, u64::MAX);
    if caps.secondary.contains(Secondary::ENABLE_EPT) {
        current.put(field::EPT_POINTER, pointers.eptp);
    }
    if caps.secondary.contains(Secondary::ENABLE_VPID) {
        current.put(field::VPID, pointers.vpid);
    }
    if caps.has_xsaves {
        // No XSAVES exits: IA32_XSS is 0 in the guest.
        current.put(field::XSS_EXITING_BITMAP, 0);
    }
    if caps.counters != Counters::default() {
        // No counter runs behind an exit that loads this.
        current.write(field::HOST_PERF_GLOBAL_CTRL, 0);
    }
    if caps.secondary.contains(Secondary::PAUSE_LOOP_EXITING) {
        current.put(field::PLE_GAP, PLE_GAP);
        current.put(field::PLE_WINDOW, PLE_WINDOW);
    }
    current.put(field::GUEST_DEBUGCTL, 0);
    current.put(field::GUEST_ACTIVITY, 0);
    current.put(field::GUEST_INTERRUPTIBILITY, 0);
    current.put(field::GUEST_PENDING_DEBUG, 0);
}
