//! Offsets of kernel structure members, from the kernel's own type information (`/sys/kernel/btf/vmlinux`).
//!
//! Format: `Documentation/bpf/btf.rst` of Linux. Only what is needed to find a member of a named structure.

use std::path::Path;

use thiserror::Error;

/// Where the kernel publishes its types.
pub const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// Why an offset is not known.
#[derive(Debug, Error)]
pub enum BtfError {
    /// The file cannot be read.
    #[error(
        "cannot read the kernel's type information {VMLINUX}: {0}; floe-agent needs a kernel built with CONFIG_DEBUG_INFO_BTF"
    )]
    Unreadable(#[source] std::io::Error),
    /// The file is not BTF as documented.
    #[error("the kernel's type information {VMLINUX} is malformed ({0}); please report this with the kernel version")]
    Malformed(&'static str),
    /// A structure or member is not there.
    #[error("the kernel's type information has no {structure}.{member}; please report this with the kernel version")]
    NoMember {
        /// The structure.
        structure: &'static str,
        /// The member.
        member: &'static str,
    },
}

const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_DECL_TAG: u32 = 17;
const KIND_ENUM64: u32 = 19;
const KIND_INT: u32 = 1;

/// Parsed type information.
pub struct Btf {
    data: Vec<u8>,
    strings: usize,
    /// Byte offset of each type; index 0 is `void`.
    types: Vec<usize>,
}

impl Btf {
    /// Reads the running kernel's types.
    pub fn of_kernel() -> Result<Self, BtfError> {
        Self::parse(std::fs::read(Path::new(VMLINUX)).map_err(BtfError::Unreadable)?)
    }

    fn parse(data: Vec<u8>) -> Result<Self, BtfError> {
        let word = |at: usize| word(&data, at).ok_or(BtfError::Malformed("truncated header"));
        if word(0)? & 0xffff != 0xeb9f {
            return Err(BtfError::Malformed("wrong magic"));
        }
        let header = word(4)? as usize;
        let (first, len) = (header + word(8)? as usize, word(12)? as usize);
        let strings = header + word(16)? as usize;
        let mut types = vec![0];
        let mut at = first;
        while at < first + len {
            types.push(at);
            let info = word(at + 4)?;
            let (kind, vlen) = ((info >> 24) & 31, (info & 0xffff) as usize);
            at += 12
                + match kind {
                    KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
                    KIND_ARRAY => 12,
                    KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => 12 * vlen,
                    KIND_ENUM | KIND_FUNC_PROTO => 8 * vlen,
                    _ => 0,
                };
        }
        Ok(Self { data, strings, types })
    }

    fn name(&self, at: usize) -> &[u8] {
        let start = self.strings + word(&self.data, at).unwrap_or(0) as usize;
        let bytes = self.data.get(start..).unwrap_or(&[]);
        &bytes[..bytes.iter().position(|&b| b == 0).unwrap_or(0)]
    }

    /// Offset in bytes of `structure.member`; members of anonymous structs and unions inside count.
    pub fn member(&self, structure: &'static str, member: &'static str) -> Result<u32, BtfError> {
        let missing = BtfError::NoMember { structure, member };
        let id = (1..self.types.len()).find(|&id| {
            let at = self.types[id];
            let info = word(&self.data, at + 4).unwrap_or(0);
            (info >> 24) & 31 == KIND_STRUCT && info & 0xffff > 0 && self.name(at) == structure.as_bytes()
        });
        id.and_then(|id| self.find(id, member.as_bytes(), 0)).ok_or(missing)
    }

    fn find(&self, id: usize, member: &[u8], depth: u32) -> Option<u32> {
        let at = *self.types.get(id)?;
        let info = word(&self.data, at + 4)?;
        if depth > 8 || !matches!((info >> 24) & 31, KIND_STRUCT | KIND_UNION) {
            return None;
        }
        let bitfields = info >> 31 == 1;
        (0..(info & 0xffff) as usize).find_map(|i| {
            let at = at + 12 + 12 * i;
            let bits = word(&self.data, at + 8)?;
            let bits = if bitfields { bits & 0x00ff_ffff } else { bits };
            if self.name(at) == member {
                return Some(bits / 8);
            }
            if self.name(at).is_empty() {
                return Some(bits / 8 + self.find(word(&self.data, at + 4)? as usize, member, depth + 1)?);
            }
            None
        })
    }
}

fn word(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(data.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_members_that_the_programs_read() {
        let Ok(btf) = Btf::of_kernel() else {
            println!("SKIPPED: finds_the_members_that_the_programs_read: no {VMLINUX}");
            return;
        };
        let pid = btf.member("task_struct", "pid").expect("pid");
        let tgid = btf.member("task_struct", "tgid").expect("tgid");
        assert_eq!(tgid, pid + 4, "pid and tgid are neighbours in every kernel since 2.6");
        assert!(btf.member("task_struct", "signal").is_ok());
        assert!(btf.member("signal_struct", "live").is_ok());
        assert!(btf.member("task_struct", "no_such_member").is_err());
    }

    #[test]
    fn refuses_what_is_not_btf() {
        assert!(matches!(Btf::parse(vec![0; 64]), Err(BtfError::Malformed(_))));
        assert!(matches!(Btf::parse(vec![0x9f, 0xeb]), Err(BtfError::Malformed(_))));
    }
}
