//! The guest page-table walker against a naive one: page tables with random and
//! with carefully wrong entries, in all four paging modes.

use std::cell::RefCell;
use std::collections::BTreeMap;

use haxm_vmx::arch::addr::{Gpa, Gva};
use haxm_vmx::arch::event::Exception;
use haxm_vmx::memory::AccessError;
use haxm_vmx::memory::walk::{Paging, TableMemory, Translation, WalkAccess, WalkFault, translate};

const PG: u64 = 1 << 31;
const WP: u64 = 1 << 16;
const PSE: u64 = 1 << 4;
const PAE: u64 = 1 << 5;
const LA57: u64 = 1 << 12;
const SMEP: u64 = 1 << 20;
const SMAP: u64 = 1 << 21;
const LMA: u64 = 1 << 10;
const NXE: u64 = 1 << 11;
const XD: u64 = 1 << 63;

/// Guest memory with the entries that a test put there.
#[derive(Default)]
struct Tables {
    entries: RefCell<BTreeMap<u64, u64>>,
    /// Everything at or above is ROM; `None`: nothing is.
    rom: Option<u64>,
    /// Nothing is mapped here.
    hole: Option<u64>,
    /// The next exchanges find the entry changed.
    races: RefCell<u32>,
}

impl Tables {
    fn put(&self, gpa: u64, entry: u64) {
        self.entries.borrow_mut().insert(gpa, entry);
    }
    fn get(&self, gpa: u64) -> u64 {
        self.entries.borrow().get(&gpa).copied().unwrap_or(0)
    }
}

impl TableMemory for Tables {
    fn entry(&self, gpa: Gpa, _size: u8) -> Result<u64, AccessError> {
        if self.hole == Some(gpa.0 & !0xfff) {
            return Err(AccessError::Mmio(gpa));
        }
        Ok(self.get(gpa.0))
    }

    fn exchange(&self, gpa: Gpa, size: u8, old: u64, new: u64) -> Result<u64, AccessError> {
        if self.rom.is_some_and(|rom| gpa.0 >= rom) {
            return Err(AccessError::RomWrite(gpa));
        }
        assert!(size == 8 || new >> 32 == 0);
        let mut races = self.races.borrow_mut();
        if *races > 0 {
            *races -= 1;
            return Ok(old ^ 0x800);
        }
        let found = self.get(gpa.0);
        if found == old {
            self.put(gpa.0, new);
        }
        Ok(found)
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 8) % limit
    }
    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// One level of a paging mode, written down from the SDM's tables: where the
/// index is, whether a page can be mapped here, which bits must be zero.
struct Level {
    shift: u32,
    index_bits: u32,
    page: bool,
    reserved: u64,
    reserved_in_page: u64,
    rights: bool,
}

/// Bits `high..=low`.
fn bits(high: u32, low: u32) -> u64 {
    if high < low {
        return 0;
    }
    (u64::MAX >> (63 - high)) & (u64::MAX << low)
}

fn levels(paging: &Paging) -> Vec<Level> {
    let m = u32::from(paging.address_bits);
    let xd = if paging.efer & NXE == 0 { XD } else { 0 };
    let level = |shift, page, reserved, reserved_in_page| Level {
        shift,
        index_bits: 9,
        page,
        reserved,
        reserved_in_page,
        rights: true,
    };
    if paging.cr4 & PAE == 0 {
        let pse = paging.cr4 & PSE != 0;
        // Table 4-4, with M at most 40: bits (M-20):13 are address bits, bits
        // 21:(M-19) are reserved.
        let beyond = bits(21, m.min(40) - 19);
        return vec![
            Level {
                index_bits: 10,
                ..level(22, pse, 0, beyond)
            },
            Level {
                index_bits: 10,
                ..level(12, true, 0, 0)
            },
        ];
    }
    if paging.efer & LMA == 0 {
        let high = bits(62, m) | xd;
        return vec![
            Level {
                index_bits: 2,
                rights: false,
                ..level(30, false, 0, 0)
            },
            level(21, true, high, high | bits(20, 13)),
            level(12, true, high, high),
        ];
    }
    let high = bits(51, m) | xd;
    let mut all = vec![
        level(39, false, high | 0x80, 0),
        level(
            30,
            paging.pages_1g,
            if paging.pages_1g { high } else { high | 0x80 },
            high | bits(29, 13),
        ),
        level(21, true, high, high | bits(20, 13)),
        level(12, true, high, high),
    ];
    if paging.cr4 & LA57 != 0 {
        all.insert(0, level(48, false, high | 0x80, 0));
    }
    all
}

/// What an access to `address` must give, and the entries it leaves.
#[allow(
    clippy::too_many_lines,
    reason = "one rule after the other, as the manual has them"
)]
fn naive(
    tables: &Tables,
    paging: &Paging,
    address: u64,
    access: WalkAccess,
) -> (Result<Translation, WalkFault>, BTreeMap<u64, u64>) {
    let before = tables.entries.borrow().clone();
    let long = paging.cr4 & PAE != 0 && paging.efer & LMA != 0;
    let address = if long && paging.cr0 & PG != 0 {
        address
    } else {
        address & 0xffff_ffff
    };
    if paging.cr0 & PG == 0 {
        return (
            Ok(Translation {
                gpa: Gpa(address),
                shift: 12,
            }),
            before,
        );
    }
    let user_access = paging.cpl == 3 && !access.implicit;
    let mut code = 0;
    if access.write {
        code |= 2;
    }
    if user_access {
        code |= 4;
    }
    if access.fetch && (paging.cr4 & SMEP != 0 || (paging.cr4 & PAE != 0 && paging.efer & NXE != 0))
    {
        code |= 16;
    }
    let fault = |extra: u32| {
        Err(WalkFault::Guest(Exception {
            vector: 14,
            error_code: Some(code | extra),
            cr2: Some(address),
        }))
    };
    let size = if paging.cr4 & PAE == 0 { 4 } else { 8 };
    let frame = bits(u32::from(paging.address_bits) - 1, 12);
    let root = match (long, paging.cr4 & PAE != 0) {
        (true, _) => paging.cr3 & frame,
        (_, true) => paging.cr3 & 0xffff_ffe0,
        _ => paging.cr3 & 0xffff_f000,
    };
    let (mut table, mut user, mut write, mut execute) = (root, true, true, true);
    let mut path = Vec::new();
    for level in levels(paging) {
        let index = (address >> level.shift) & ((1 << level.index_bits) - 1);
        let gpa = table + index * size;
        let loaded = paging.pdptes.filter(|_| !level.rights);
        let entry = loaded.map_or_else(|| tables.get(gpa), |pdptes| pdptes[index as usize]);
        if entry & 1 == 0 {
            return (fault(0), before);
        }
        let page = level.shift == 12 || (level.page && entry & 0x80 != 0);
        let reserved = if page {
            level.reserved_in_page
        } else {
            level.reserved
        };
        if entry & reserved != 0 {
            return (fault(9), before);
        }
        if level.rights {
            user &= entry & 4 != 0;
            write &= entry & 2 != 0;
            execute &= entry & XD == 0 || size == 4;
            path.push(gpa);
        }
        table = entry & frame;
        if !page {
            continue;
        }
        let ok = if user_access {
            user && (write || !access.write) && (execute || !access.fetch)
        } else if access.fetch {
            execute && !(user && paging.cr4 & SMEP != 0)
        } else {
            let smap = paging.cr4 & SMAP != 0 && (access.implicit || !paging.ac);
            !(user && smap) && (write || !access.write || paging.cr0 & WP == 0)
        };
        if !ok {
            return (fault(1), before);
        }
        let mut after = before;
        for gpa in &path {
            *after.get_mut(gpa).unwrap() |= 0x20;
        }
        if access.write {
            *after.get_mut(path.last().unwrap()).unwrap() |= 0x40;
        }
        let offset = (1 << level.shift) - 1;
        let mut base = table & !offset;
        if level.shift == 22 {
            base = (entry & bits(31, 22)) | ((entry & bits(20, 13)) << 19);
        }
        let translation = Translation {
            gpa: Gpa(base | (address & offset)),
            shift: level.shift,
        };
        return (Ok(translation), after);
    }
    unreachable!()
}

/// Registers for one of the modes.
fn registers(random: &mut Random) -> Paging {
    let mut paging = Paging {
        cr0: PG,
        cr3: (0x1000 * (1 + random.below(3))) | (random.next() & 0x18),
        cpl: random.below(4) as u8,
        ac: random.one_in(2),
        address_bits: [32, 36, 39, 40, 46, 52][random.below(6) as usize],
        pages_1g: random.one_in(2),
        ..Paging::default()
    };
    paging.cr0 |= WP * random.below(2);
    for bit in [PSE, SMEP, SMAP] {
        paging.cr4 |= bit * random.below(2);
    }
    paging.efer |= NXE * random.below(2);
    match random.below(9) {
        0 => paging.cr0 &= !PG,
        1 | 2 => {}
        3 | 4 => paging.cr4 |= PAE,
        5 | 6 => {
            paging.cr4 |= PAE;
            paging.efer |= LMA;
        }
        _ => {
            paging.cr4 |= PAE | LA57;
            paging.efer |= LMA;
        }
    }
    paging
}

/// Tables for one address: mostly good entries, now and then a bit that makes
/// a difference.
fn build(random: &mut Random, paging: &mut Paging, address: u64) -> Tables {
    let tables = Tables::default();
    let narrow = paging.cr4 & PAE == 0;
    let size = if narrow { 4 } else { 8 };
    let mut table = match (paging.cr4 & PAE != 0, paging.efer & LMA != 0) {
        (true, false) => paging.cr3 & 0xffff_ffe0,
        _ => paging.cr3 & 0xffff_f000,
    };
    for (number, level) in levels(paging).iter().enumerate() {
        let index = (address >> level.shift) & ((1 << level.index_bits) - 1);
        let next = 0x10_0000 * (1 + number as u64) + 0x1000 * random.below(16);
        let mut entry = next | 1;
        if level.rights {
            entry |= random.next() & 0xe60;
            entry |= if random.one_in(4) {
                random.next() & 6
            } else {
                6
            };
            if level.page && level.shift > 12 && random.one_in(3) {
                let high = random.next() & bits(u32::from(paging.address_bits) - 1, level.shift);
                entry = (entry & 0xfff) | high | 0x80;
                if narrow {
                    entry = (entry & 0xffff_ffff) | (random.next() & 0x1e_1000);
                }
            }
            if level.shift == 12 {
                entry |= random.next() & bits(u32::from(paging.address_bits) - 1, 12);
            }
            if random.one_in(3) && !narrow {
                entry |= XD * random.below(2);
            }
            if random.one_in(6) {
                entry ^= 1 << random.below(64);
            }
        } else if random.one_in(20) {
            entry = 0;
        }
        if narrow {
            entry &= 0xffff_ffff;
        }
        if !level.rights && random.one_in(2) {
            let mut pdptes = [0; 4];
            pdptes[index as usize] = entry;
            paging.pdptes = Some(pdptes);
        } else {
            tables.put(table + index * size, entry);
        }
        table = entry & bits(51, 12);
    }
    tables
}

#[test]
fn agrees_with_a_naive_walker() {
    let mut random = Random(0x1234_5678_9abc_def1);
    let (mut good, mut codes) = (0, BTreeMap::new());
    for case in 0..200_000 {
        let mut paging = registers(&mut random);
        let address = random.next();
        let tables = build(&mut random, &mut paging, address);
        let access = WalkAccess {
            write: random.one_in(2),
            fetch: false,
            implicit: random.one_in(8),
        };
        let access = if random.one_in(3) {
            WalkAccess {
                write: false,
                fetch: true,
                ..access
            }
        } else {
            access
        };
        let (expected, after) = naive(&tables, &paging, address, access);
        let found = translate(&tables, &paging, Gva(address), access);
        assert_eq!(
            found, expected,
            "case {case}: {paging:x?} {address:#x} {access:?}"
        );
        assert_eq!(*tables.entries.borrow(), after, "case {case}");
        match expected {
            Ok(_) => good += 1,
            Err(WalkFault::Guest(exception)) => {
                *codes.entry(exception.error_code.unwrap()).or_insert(0) += 1;
            }
            Err(other) => panic!("{other:?}"),
        }
    }
    // Every outcome the manual knows came up: W, U, I with P = 0 and 1, and
    // reserved bits.
    assert!(good > 40_000, "{good}");
    for base in [0, 1, 9] {
        for code in [base, base | 2, base | 4, base | 6, base | 16, base | 20] {
            assert!(codes.contains_key(&code), "no fault with code {code:#x}");
        }
    }
}

/// 4-level tables that map one page at address 0.
fn simple() -> (Tables, Paging) {
    let tables = Tables::default();
    for level in 1..=4 {
        tables.put(level * 0x1000, ((level + 1) * 0x1000) | 7);
    }
    let paging = Paging {
        cr0: PG | WP,
        cr3: 0x1000,
        cr4: PAE,
        efer: LMA | NXE,
        address_bits: 40,
        ..Paging::default()
    };
    (tables, paging)
}

const WRITE: WalkAccess = WalkAccess {
    write: true,
    fetch: false,
    implicit: false,
};

#[test]
fn an_entry_that_changes_is_read_again() {
    let (tables, paging) = simple();
    *tables.races.borrow_mut() = 3;
    let found = translate(&tables, &paging, Gva(0x123), WRITE).unwrap();
    assert_eq!(found.gpa, Gpa(0x5123));
    assert_eq!(tables.get(0x4000), 0x5067);
    assert_eq!(tables.get(0x1000), 0x2027);
}

#[test]
fn an_entry_that_never_rests_ends_the_walk() {
    let (tables, paging) = simple();
    *tables.races.borrow_mut() = 1000;
    let found = translate(&tables, &paging, Gva(0), WRITE);
    assert_eq!(found, Err(WalkFault::Retry));
}

#[test]
fn tables_in_rom_keep_their_flags() {
    let (mut tables, paging) = simple();
    tables.rom = Some(0x3000);
    let found = translate(&tables, &paging, Gva(0), WRITE).unwrap();
    assert_eq!(found.gpa, Gpa(0x5000));
    assert_eq!(tables.get(0x2000), 0x3027);
    assert_eq!(tables.get(0x4000), 0x5007);
}

#[test]
fn a_table_that_is_not_there_is_named() {
    let (mut tables, paging) = simple();
    tables.hole = Some(0x3000);
    let found = translate(&tables, &paging, Gva(0), WRITE);
    assert_eq!(found, Err(WalkFault::Hole(Gpa(0x3000))));
}
