//! Device node names.

use haxm_abi::{Os, node};

#[test]
fn posix_names() {
    assert_eq!((node::POSIX_PREFIX, node::SYSTEM), ("/dev/", "HAX"));
    for os in [Os::Linux, Os::Darwin, Os::NetBsd] {
        assert_eq!(node::vm(os, 0).as_str(), "hax_vm/vm00");
        assert_eq!(node::vm(os, 63).as_str(), "hax_vm/vm63");
        assert_eq!(node::vcpu(os, 7, 15).as_str(), "hax_vm07/vcpu15");
    }
    assert_eq!(node::vm(Os::Linux, 5).as_bytes_with_nul(), b"hax_vm/vm05\0");
}

#[test]
fn windows_names() {
    assert_eq!(node::vm(Os::Windows, 9).as_str(), "hax_vm09");
    assert_eq!(node::vcpu(Os::Windows, 10, 3).as_str(), "hax_vm10_vcpu03");
    assert_eq!(node::WINDOWS_USER_PREFIX, r"\\.\");
    assert_eq!(node::WINDOWS_DEVICE_PREFIX, r"\Device\");
    assert_eq!(node::WINDOWS_LINK_PREFIX, r"\DosDevices\");
}

#[test]
fn numbers_of_any_size_fit() {
    assert_eq!(node::vm(Os::Linux, 100).as_str(), "hax_vm/vm100");
    assert_eq!(
        node::vcpu(Os::Linux, u32::MAX, u32::MAX).as_bytes_with_nul(),
        b"hax_vm4294967295/vcpu4294967295\0"
    );
}
