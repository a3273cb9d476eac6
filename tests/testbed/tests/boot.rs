//! Boots the emulated PC. Slow, and the first time it downloads and builds: only on request,
//! `cargo test -p haxm-testbed -- --ignored`.

use std::io;
use std::time::Duration;

use testbed::outcome::{NO_VERDICT, NOT_STARTED, TIMED_OUT};
use testbed::{Cause, Outcome, Pc, cpu, firmware};

fn run(pc: &Pc) -> Outcome {
    pc.run(&mut io::sink())
        .expect("the emulated PC could not be put together")
}

/// Prints every processor's IA32_FEATURE_CONTROL.
const PRINT_FEATURE_CONTROL: &str = "
for c in /dev/cpu/*/msr; do
    echo \"3a=$(dd if=$c bs=8 count=1 skip=58 iflag=skip_bytes 2>/dev/null | od -An -tu8 | tr -d ' ')\"
done
grep -c '^flags.* vmx' /proc/cpuinfo
";

#[test]
#[ignore = "boots the emulated PC"]
fn two_boots_are_the_same() {
    for cpus in [1, 2] {
        let pc = Pc::new()
            .cpus(cpus)
            .script("dmesg; ls -lR / 2>/dev/null | head -500; tick end");
        let (a, b) = (run(&pc), run(&pc));
        assert!(a.success(), "{a}");
        assert!(
            a.ticks > a.boot_ticks + a.steps_ticks && a.boot_ticks > 100_000_000,
            "{a}"
        );
        assert_eq!(a.serial, b.serial, "{cpus} processors");
        assert_eq!(
            (a.ticks, a.steps_ticks),
            (b.ticks, b.steps_ticks),
            "{cpus} processors"
        );
    }
}

#[test]
#[ignore = "boots the emulated PC"]
fn other_contents_give_another_count() {
    let a = run(&Pc::new().script("true"));
    let b = run(&Pc::new().script("for i in 1 2 3 4 5; do :; done"));
    assert!(
        a.success() && b.success() && b.steps_ticks > a.steps_ticks,
        "{a}\n{b}"
    );
}

#[test]
#[ignore = "boots the emulated PC"]
fn every_way_to_end_is_told_apart() {
    let seven = run(&Pc::new().script("exit 7"));
    assert_eq!((seven.code, &seven.cause), (7, &Cause::PowerOff));
    let panic = run(&Pc::new().script("echo c > /proc/sysrq-trigger"));
    assert_eq!(
        (panic.code, &panic.cause),
        (NO_VERDICT, &Cause::TripleFault)
    );
    assert!(panic.serial.contains("Kernel panic"), "{}", panic.serial);
    let off = run(&Pc::new().script("poweroff -f"));
    assert_eq!((off.code, &off.cause), (NO_VERDICT, &Cause::PowerOff));
    let hang = run(&Pc::new().timeout(Duration::from_millis(500)));
    assert_eq!((hang.code, &hang.cause), (TIMED_OUT, &Cause::TimedOut));
    let none = run(&Pc::new().cpu("no_such_model"));
    assert_eq!(none.code, NOT_STARTED);
    assert!(matches!(none.cause, Cause::NotStarted(_)), "{none}");
}

#[test]
#[ignore = "boots the emulated PC"]
fn nothing_of_a_long_output_is_lost() {
    let outcome = run(&Pc::new().script("seq 1 5000; printf end"));
    let mut want: String = (1..=5000).map(|n| format!("{n}\n")).collect();
    want.push_str("end\n@@TICKS steps");
    assert!(outcome.serial.contains(&want), "{}", outcome.serial);
}

#[test]
#[ignore = "boots the emulated PC"]
fn processors_offer_what_their_names_here_say() {
    let script = "
        grep -q -w vmx /proc/cpuinfo || { echo '=none'; exit 0; }
        insmod /lib/modules/kvm-intel.ko ept=1 unrestricted_guest=1 || exit 1
        cd /sys/module/kvm_intel/parameters && echo =$(cat ept)$(cat unrestricted_guest)";
    for (model, want) in [
        (cpu::WITHOUT_VMX, "none"),
        (cpu::WITHOUT_EPT, "NN"),
        (cpu::WITHOUT_UNRESTRICTED_GUEST, "YN"),
        (cpu::HASWELL, "YY"),
        (cpu::SKYLAKE_X, "YY"),
    ] {
        let outcome = run(&Pc::new().cpu(model).module_file("kvm-intel").script(script));
        assert!(outcome.success(), "{model}: {outcome}");
        let found = outcome.serial.lines().find_map(|l| l.strip_prefix('='));
        assert_eq!(found, Some(want), "{model}");
        println!("{model}: {outcome}");
    }
}

#[test]
#[ignore = "boots the emulated PC"]
fn firmware_can_lock_vt_x_off_on_every_processor() {
    let pc = Pc::new()
        .cpus(2)
        .module("msr", "")
        .script(PRINT_FEATURE_CONTROL);
    let lines = |value| {
        let outcome = run(&pc.clone().feature_control(value));
        let lines = outcome
            .serial
            .lines()
            .filter(|l| l.starts_with("3a=") || l.len() == 1);
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(lines(firmware::LOCKED_OFF), ["3a=1", "3a=1", "0"]);
    assert_eq!(lines(firmware::LOCKED_ON), ["3a=5", "3a=5", "2"]);
    // Linux locks what the firmware left open.
    assert_eq!(lines(firmware::OPEN), ["3a=5", "3a=5", "2"]);
}
