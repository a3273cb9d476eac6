//! Every check of a VM entry: one state that passes, and at least one that
//! fails it.

mod states;

use std::collections::BTreeSet;

use sim::rig::Rig;
use sim::{Check, Profile, Stage};
use vmx::host::Host;
use vmx::vcpu::entry_checks::first_violated;

use states::{Change, INFO, To, apply, bad, bad_on_skylake, good};

fn stage(check: Check) -> Stage {
    match check {
        Check::MsrLoad => Stage::MsrLoading,
        c if c < Check::HostCr0 => Stage::Controls,
        c if c < Check::GuestCr0 => Stage::HostState,
        _ => Stage::GuestState,
    }
}

fn fails(profile: Profile, check: Check, changes: &[Change]) {
    let mut rig = Rig::new(profile);
    apply(&rig, changes);
    if check == Check::MsrLoad {
        // Entry 1 is fine, entry 2 loads a base that only the VMCS may load.
        let area = rig.spare(0);
        rig.poke(area, 0xc000_0102);
        rig.poke(area + 8, 0x7f12_0000_1000);
        rig.poke(area + 16, 0xc000_0100);
        rig.write(0x200a, area).unwrap();
        rig.write(0x4014, 2).unwrap();
    }
    let info = rig.read(INFO);
    let result = rig.enter();
    let failures = rig.machine.entry_failures();
    assert_eq!(failures.len(), 1, "{check:?}: entered");
    assert!(
        failures[0].checks.contains(&check),
        "{check:?}: {failures:?}"
    );
    assert_eq!(failures[0].stage, stage(check), "{check:?}");
    match failures[0].stage {
        Stage::Controls => assert_eq!(result, Err(Some(7))),
        Stage::HostState => assert_eq!(result, Err(Some(8))),
        Stage::GuestState | Stage::MsrLoading => {
            let reason = if check == Check::MsrLoad { 34 } else { 33 };
            assert_eq!(result, Ok(1 << 31 | reason));
            let qualification = match failures[0].checks[0] {
                Check::Pdptes | Check::MsrLoad => 2,
                Check::BlockingNmiSti => 3,
                Check::LinkPointer => 4,
                _ => 0,
            };
            assert_eq!(rig.read(0x6400), qualification, "{check:?}");
            named_by_the_core(&rig, check, &failures[0].checks);
            // 27.8: the injected event stays, and the VMCS stays clear.
            assert_eq!(rig.read(INFO), info);
            assert_eq!(rig.enter_as(true), Err(Some(5)));
        }
    }
    // The rejected state may hold values that the host registers got.
    let _ = rig.machine.take_findings();
}

/// The core's own walk after a failure names one of the checks that failed.
fn named_by_the_core(rig: &Rig, check: Check, failed: &[Check]) {
    use Check::{
        ActivityBlocking, ActivityEvent, ActivityHltDpl, ActivityUnsupported, GuestPerfGlobalCtrl,
        LinkPointer, MsrLoad,
    };
    let caps = vmx::caps::examine(rig.machine.host().cpu()).expect("a processor with VMX");
    let named = first_violated(|field| rig.read(field), &caps);
    let never_changed = [
        ActivityUnsupported,
        ActivityHltDpl,
        ActivityBlocking,
        ActivityEvent,
        GuestPerfGlobalCtrl,
        LinkPointer,
    ];
    if never_changed.contains(&check) || check == MsrLoad {
        return;
    }
    let names: Vec<String> = failed.iter().map(|check| format!("{check:?}")).collect();
    assert!(
        names.iter().any(|name| Some(name.as_str()) == named),
        "{check:?}: {named:?}"
    );
}

#[test]
fn a_valid_state_enters_on_every_model() {
    for profile in Profile::working().into_iter().chain([Profile::no_ept()]) {
        let name = profile.name;
        let mut rig = Rig::new(profile);
        // Nothing to do: the first exit is the host's interrupt.
        assert_eq!(
            rig.enter(),
            Ok(1),
            "{name}: {:?}",
            rig.machine.entry_failures()
        );
        rig.interrupts_on();
        assert_eq!(rig.enter(), Ok(1), "{name}");
        assert_eq!(rig.machine.counts().vmlaunch, 1);
        assert_eq!(rig.machine.counts().vmresume, 1);
    }
}

#[test]
fn the_good_states_enter() {
    for (name, changes) in good() {
        let mut rig = Rig::new(Profile::haswell());
        apply(&rig, &changes);
        let expect = if name == "NMI window" { 8 } else { 1 };
        let caps = vmx::caps::examine(rig.machine.host().cpu()).expect("a processor with VMX");
        assert_eq!(
            first_violated(|field| rig.read(field), &caps),
            None,
            "{name}"
        );
        assert_eq!(
            rig.enter(),
            Ok(expect),
            "{name}: {:?}",
            rig.machine.entry_failures()
        );
    }
}

/// SDM 27.2.1.1: the TPR threshold is one class, and not above VTPR's.
#[test]
fn the_threshold_is_not_above_the_tpr() {
    let with_threshold = |threshold, vtpr| {
        let mut rig = Rig::new(Profile::haswell());
        rig.poke(rig.spare(0) + 0x80, vtpr);
        let page = To::Set(rig.spare(0));
        let shadow = To::Or(1 << 21);
        let threshold = To::Set(threshold);
        apply(
            &rig,
            &[(0x4002, shadow), (0x2012, page), (0x401c, threshold)],
        );
        let entered = rig.enter();
        let failed = rig
            .machine
            .entry_failures()
            .pop()
            .map(|failure| failure.checks);
        (entered, failed)
    };
    let refused = (Err(Some(7)), Some(vec![Check::TprThreshold]));
    assert_eq!(with_threshold(0, 0), (Ok(1), None));
    assert_eq!(with_threshold(5, 0x50), (Ok(1), None));
    assert_eq!(with_threshold(15, 0xff), (Ok(1), None));
    assert_eq!(with_threshold(1, 0x0f), refused);
    assert_eq!(with_threshold(6, 0x5f), refused);
    assert_eq!(with_threshold(0x15, 0xf0), refused);
}

#[test]
fn each_bad_state_fails_its_check() {
    for (check, changes) in bad() {
        fails(Profile::haswell(), check, &changes);
    }
    for (check, changes) in bad_on_skylake() {
        fails(Profile::skylake_x(), check, &changes);
    }
}

#[test]
fn every_check_has_a_state_that_fails_it() {
    let tried: BTreeSet<Check> = bad()
        .iter()
        .chain(&bad_on_skylake())
        .map(|(check, _)| *check)
        .collect();
    let all: BTreeSet<Check> = Check::ALL.iter().copied().collect();
    assert_eq!(
        all.difference(&tried).collect::<Vec<_>>(),
        Vec::<&Check>::new()
    );
}

/// Each bad state fails because of what was changed last, not by itself:
/// leaving the last change out, the check passes.
#[test]
fn the_last_change_is_what_fails() {
    // Where two changes together make it, the first may do it alone.
    let alone = [
        Check::Eptp,
        Check::SegmentG,
        Check::HostSsNull,
        Check::SsDpl,
        Check::InjectLength,
        Check::SsRpl,
    ];
    let mut wrong = Vec::new();
    for (check, changes) in bad() {
        let Some((_, rest)) = changes.split_last() else {
            continue;
        };
        let mut rig = Rig::new(Profile::haswell());
        apply(&rig, rest);
        let _ = rig.enter();
        let failures = rig.machine.entry_failures();
        let seen = failures.iter().any(|f| f.checks.contains(&check));
        if seen && !alone.contains(&check) {
            wrong.push((check, failures));
        }
        let _ = rig.machine.take_findings();
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
