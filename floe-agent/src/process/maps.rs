//! `/proc/<pid>/maps`, typed.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use crate::units::{FileOffset, Pid, UserAddr};

/// Largest `maps` file that is read; a process has a few hundred to a few thousand mappings.
const MAX_BYTES: u64 = 16 << 20;

/// One mapping of a process.
#[allow(clippy::struct_excessive_bools)] // permissions
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First byte.
    pub start: UserAddr,
    /// Behind the last byte.
    pub end: UserAddr,
    /// Readable.
    pub read: bool,
    /// Writable.
    pub write: bool,
    /// Executable.
    pub execute: bool,
    /// Where in the file the mapping begins.
    pub offset: FileOffset,
    /// Device number as `maps` prints it: major and minor.
    pub device: (u32, u32),
    /// Inode; 0 for memory that is no file.
    pub inode: u64,
    /// Path or `[name]` as the kernel gives it; ` (deleted)` is taken off.
    pub path: PathBuf,
    /// The file has been deleted or replaced since it was mapped.
    pub deleted: bool,
}

impl Mapping {
    /// Whether `addr` is in it.
    pub fn contains(&self, addr: UserAddr) -> bool {
        (self.start..self.end).contains(&addr)
    }

    /// A path by which the mapped file can be opened, whatever namespace the process is in and even if it was deleted.
    /// Needs `CAP_SYS_ADMIN` or `CAP_CHECKPOINT_RESTORE`.
    pub fn map_file(&self, pid: Pid) -> PathBuf {
        PathBuf::from(format!(
            "/proc/{pid}/map_files/{:x}-{:x}",
            self.start.0, self.end.0
        ))
    }

    /// The path below the root directory of the process.
    pub fn path_in_root(&self, pid: Pid) -> PathBuf {
        let relative = self.path.strip_prefix("/").unwrap_or(&self.path);
        Path::new("/proc")
            .join(pid.to_string())
            .join("root")
            .join(relative)
    }

    fn parse(line: &[u8]) -> Option<Self> {
        // start-end perms offset major:minor inode path
        let mut rest = line;
        let mut word = || {
            let begin = rest.iter().position(|&b| b != b' ')?;
            let len = rest[begin..]
                .iter()
                .position(|&b| b == b' ')
                .unwrap_or(rest.len() - begin);
            let word = std::str::from_utf8(&rest[begin..begin + len]).ok();
            rest = &rest[begin + len..];
            word
        };
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let (start, end) = word()?.split_once('-')?;
        let perms = word()?.as_bytes();
        let offset = hex(word()?)?;
        let (major, minor) = word()?.split_once(':')?;
        let inode = word()?.parse().ok()?;
        let path = rest.trim_ascii_start();
        let (path, deleted) = match path.strip_suffix(b" (deleted)") {
            Some(path) => (path, true),
            None => (path, false),
        };
        if perms.len() < 3 {
            return None;
        }
        Some(Self {
            start: UserAddr(hex(start)?),
            end: UserAddr(hex(end)?),
            read: perms[0] == b'r',
            write: perms[1] == b'w',
            execute: perms[2] == b'x',
            offset: FileOffset(offset),
            device: (
                u32::from_str_radix(major, 16).ok()?,
                u32::from_str_radix(minor, 16).ok()?,
            ),
            inode,
            path: PathBuf::from(OsString::from_vec(path.to_vec())),
            deleted,
        })
    }
}

/// Parses the text of a `maps` file; lines that are not understood are left out.
pub fn parse(text: &[u8]) -> Vec<Mapping> {
    text.split(|&b| b == b'\n')
        .filter_map(Mapping::parse)
        .collect()
}

/// The mappings of a process.
pub fn read(pid: Pid) -> io::Result<Vec<Mapping>> {
    let mut text = Vec::new();
    File::open(format!("/proc/{pid}/maps"))?
        .take(MAX_BYTES)
        .read_to_end(&mut text)?;
    Ok(parse(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_understood() {
        let text = b"7f00-8000 r-xp 00001000 fe:01 4711                       /usr/lib/lib with space.so (deleted)
9000-a000 rw-p 00000000 00:00 0
a000-b000 rw-p 00000000 00:00 0                          [heap]
garbage
c000-d000 r
\xff\xfe";
        let maps = parse(text);
        assert_eq!(maps.len(), 3);
        assert_eq!(maps[0].start, UserAddr(0x7f00));
        assert_eq!(maps[0].offset, FileOffset(0x1000));
        assert_eq!(maps[0].device, (0xfe, 1));
        assert_eq!(maps[0].inode, 4711);
        assert!(maps[0].deleted && maps[0].execute && !maps[0].write);
        assert_eq!(maps[0].path, Path::new("/usr/lib/lib with space.so"));
        assert_eq!(
            maps[0].path_in_root(Pid(5)),
            Path::new("/proc/5/root/usr/lib/lib with space.so")
        );
        assert_eq!(maps[1].path, Path::new(""));
        assert_eq!(maps[2].path, Path::new("[heap]"));
        assert!(maps[2].contains(UserAddr(0xafff)) && !maps[2].contains(UserAddr(0xb000)));
    }

    #[test]
    fn own_maps_hold_own_code() {
        let pid = Pid(std::process::id());
        let code = UserAddr(parse as *const () as u64);
        let maps = read(pid).unwrap();
        let mapping = maps.iter().find(|m| m.contains(code)).unwrap();
        assert!(mapping.execute);
        assert_eq!(mapping.path, std::env::current_exe().unwrap());
    }
}
