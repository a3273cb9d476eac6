//! Links the Rust half of `haxm.ko` into one object. It has no code: what is
//! linked is compiled for size, but for functions that say `optimize(speed)`; and
//! the link optimizes those as it should only if it is not itself for size (see
//! `profile.module` in the workspace's `Cargo.toml`).
#![no_std]

extern crate haxm_linux;
