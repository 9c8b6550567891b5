//! One ELF file: the few symbols, segments and notes of it that matter here.
//!
//! The file is read in ranges, never as a whole; sizes that it states are bounded. Works on stripped files: symbols come
//! from `.dynsym`; `.symtab` adds to them where it exists and is never depended on.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use object::elf;
use object::pod;
use object::read::elf::{Dyn as _, FileHeader as _, ProgramHeader as _, SectionHeader as _};
use object::read::{ReadCache, ReadRef as _, StringTable};
use object::{Endianness, U32, U64};

use crate::process::identity;
use crate::units::{FileAddr, FileOffset};

/// Largest file that is looked at. Interpreters have about 30 MB.
const MAX_FILE: u64 = 1 << 30;
/// Largest symbol or string table.
const MAX_TABLE: u64 = 64 << 20;
/// Most program headers, section headers and dynamic entries.
const MAX_HEADERS: usize = 4096;

/// Why a file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    /// It could not be opened or read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not a 64-bit little-endian x86 ELF file.
    #[error("{path} is not an x86-64 ELF file")]
    NotElf {
        /// Which file.
        path: PathBuf,
    },
    /// It is larger than anything that could be an interpreter.
    #[error("{path} has {size} bytes; files of more than 1 GiB are not examined")]
    TooLarge {
        /// Which file.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// Its tables contradict each other.
    #[error("{path} is damaged: {what}")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// An address that no segment of the file holds.
    #[error("{path} has no {len} bytes of data at address {addr}")]
    NoData {
        /// Which file.
        path: PathBuf,
        /// Where.
        addr: FileAddr,
        /// How many bytes.
        len: usize,
    },
}

/// Which file this is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    /// Device.
    pub device: u64,
    /// Inode.
    pub inode: u64,
    /// Size in bytes; with `changed` it tells a reused inode from the file it was.
    pub size: u64,
    /// Time of the last change of the inode, in nanoseconds.
    pub changed: i128,
}

impl FileIdentity {
    /// Identity of an open file.
    pub fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.len(),
            changed: i128::from(meta.ctime()) * 1_000_000_000 + i128::from(meta.ctime_nsec()),
        })
    }
}

/// A part of the file that is mapped when it is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where in the file.
    pub offset: FileOffset,
    /// Address.
    pub addr: FileAddr,
    /// Bytes in the file.
    pub file_size: u64,
    /// Bytes in memory.
    pub memory_size: u64,
    /// Whether it holds code.
    pub executable: bool,
}

/// An ELF file, opened.
#[derive(Debug)]
pub struct ElfFile {
    path: PathBuf,
    file: File,
    identity: FileIdentity,
    segments: Vec<Segment>,
    symbols: HashMap<&'static str, FileAddr>,
    needed: Vec<String>,
    soname: Option<String>,
    runpath: Vec<String>,
    build_id: Vec<u8>,
    py_runtime: Option<FileAddr>,
    /// `DT_RELA` and its size.
    relocations: Option<(FileAddr, u64)>,
}

impl ElfFile {
    /// Opens a file and reads its tables, looking up the `wanted` symbols.
    pub fn read(path: &Path, wanted: &[&'static str]) -> Result<Self, ElfError> {
        let io = |source| ElfError::Io { path: path.to_owned(), source };
        let file = identity::open(path).map_err(io)?;
        let meta = file.metadata().map_err(io)?;
        let identity = FileIdentity::of(&file).map_err(io)?;
        if !meta.is_file() {
            return Err(ElfError::NotElf { path: path.to_owned() });
        }
        if identity.size > MAX_FILE {
            return Err(ElfError::TooLarge { path: path.to_owned(), size: identity.size });
        }
        let mut this = Self {
            path: path.to_owned(),
            file,
            identity,
            segments: Vec::new(),
            symbols: HashMap::new(),
            needed: Vec::new(),
            soname: None,
            runpath: Vec::new(),
            build_id: Vec::new(),
            py_runtime: None,
            relocations: None,
        };
        this.parse(wanted).map_err(|what| match what {
            Problem::NotElf => ElfError::NotElf { path: path.to_owned() },
            Problem::Damaged(what) => ElfError::Damaged { path: path.to_owned(), what },
        })?;
        Ok(this)
    }

    fn parse(&mut self, wanted: &[&'static str]) -> Result<(), Problem> {
        use Problem::{Damaged, NotElf};
        let file = self.file.try_clone().map_err(|_| Damaged("it cannot be opened twice"))?;
        let cache = ReadCache::new(file);
        let data = &cache;
        let header = elf::FileHeader64::<Endianness>::parse(data).map_err(|_| NotElf)?;
        let endian = header.endian().map_err(|_| NotElf)?;
        if endian != Endianness::Little || header.e_machine(endian) != elf::EM_X86_64 {
            return Err(NotElf);
        }

        let headers = header.program_headers(endian, data).map_err(|_| Damaged("program headers"))?;
        for segment in headers.iter().take(MAX_HEADERS) {
            match segment.p_type(endian) {
                elf::PT_LOAD => self.segments.push(Segment {
                    offset: FileOffset(segment.p_offset(endian)),
                    addr: FileAddr(segment.p_vaddr(endian)),
                    file_size: segment.p_filesz(endian),
                    memory_size: segment.p_memsz(endian),
                    executable: segment.p_flags(endian) & elf::PF_X != elf::ProgramFlags(0),
                }),
                elf::PT_NOTE => {
                    if let Ok(Some(mut notes)) = segment.notes(endian, data) {
                        for _ in 0..MAX_HEADERS {
                            let Ok(Some(note)) = notes.next() else { break };
                            if note.n_type(endian) == elf::NT_GNU_BUILD_ID && note.name() == elf::ELF_NOTE_GNU {
                                self.build_id = note.desc().iter().copied().take(64).collect();
                            }
                        }
                    }
                }
                _ => {}
            }
        }
        self.parse_dynamic(headers, endian, data)?;

        let sections = header.sections(endian, data).map_err(|_| Damaged("section headers"))?;
        for kind in [elf::SHT_DYNSYM, elf::SHT_SYMTAB] {
            let Some(section) = sections.iter().take(MAX_HEADERS).find(|s| s.sh_type(endian) == kind) else {
                continue;
            };
            let strings = sections
                .section(object::SectionIndex(section.sh_link(endian) as usize))
                .map_err(|_| Damaged("the symbol table has no string table"))?;
            if section.sh_size(endian) > MAX_TABLE || strings.sh_size(endian) > MAX_TABLE {
                continue;
            }
            let symbols = section.data(endian, data).map_err(|_| Damaged("symbol table"))?;
            let names = strings.data(endian, data).map_err(|_| Damaged("string table"))?;
            self.look_up(wanted, symbols, names, endian);
            // A program that embeds Python exports its symbols, for extension modules; `.symtab` is for the odd one.
            if !self.symbols.is_empty() {
                break;
            }
        }
        for section in sections.iter().take(MAX_HEADERS) {
            if sections.section_name(endian, section) == Ok(b".PyRuntime") {
                self.py_runtime = Some(FileAddr(section.sh_addr(endian)));
            }
        }
        Ok(())
    }

    fn parse_dynamic(
        &mut self,
        headers: &[elf::ProgramHeader64<Endianness>],
        endian: Endianness,
        data: &ReadCache<File>,
    ) -> Result<(), Problem> {
        use Problem::Damaged;
        let Some(dynamic) = headers.iter().find_map(|segment| segment.dynamic(endian, data).ok().flatten()) else {
            return Ok(()); // statically linked
        };
        let value = |tag| {
            dynamic.iter().take(MAX_HEADERS).find(|entry| entry.d_tag(endian) == tag).map(|entry| entry.d_val(endian))
        };
        self.relocations = value(elf::DT_RELA).zip(value(elf::DT_RELASZ)).map(|(table, size)| (FileAddr(table), size));
        let (Some(strings), Some(size)) = (value(elf::DT_STRTAB), value(elf::DT_STRSZ)) else {
            return Ok(());
        };
        if size > MAX_TABLE {
            return Err(Damaged("dynamic string table too large"));
        }
        let offset = self.file_offset(FileAddr(strings)).ok_or(Damaged("no dynamic string table"))?;
        let bytes = data.read_bytes_at(offset.0, size).map_err(|()| Damaged("dynamic string table"))?;
        let names = StringTable::new(bytes, 0, size);
        for entry in dynamic.iter().take(MAX_HEADERS) {
            let tag = entry.d_tag(endian);
            if ![elf::DT_NEEDED, elf::DT_SONAME, elf::DT_RUNPATH, elf::DT_RPATH].contains(&tag) {
                continue;
            }
            let Ok(name) = names.get(entry.d_val(endian) as u32) else {
                continue;
            };
            let name = String::from_utf8_lossy(name).into_owned();
            match tag {
                elf::DT_NEEDED => self.needed.push(name),
                elf::DT_SONAME => self.soname = Some(name),
                _ => self.runpath.extend(name.split(':').map(str::to_owned)),
            }
        }
        Ok(())
    }

    /// One pass over a symbol table: compares the text behind each name offset with the few wanted names.
    fn look_up(&mut self, wanted: &[&'static str], symbols: &[u8], names: &[u8], endian: Endianness) {
        const SYMBOL: usize = size_of::<elf::Sym64<Endianness>>();
        let count = symbols.len() / SYMBOL;
        let Ok((entries, _)) = pod::slice_from_bytes::<elf::Sym64<Endianness>>(symbols, count) else {
            return;
        };
        for entry in entries {
            let name: U32<Endianness> = entry.st_name;
            let value: U64<Endianness> = entry.st_value;
            if entry.st_shndx.get(endian) == elf::SHN_UNDEF {
                continue;
            }
            let Some(text) = names.get(name.get(endian) as usize..) else {
                continue;
            };
            for wanted in wanted {
                if text.len() > wanted.len() && text[wanted.len()] == 0 && &text[..wanted.len()] == wanted.as_bytes() {
                    self.symbols.entry(wanted).or_insert(FileAddr(value.get(endian)));
                }
            }
        }
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which file it is.
    pub const fn identity(&self) -> FileIdentity {
        self.identity
    }

    /// Address of a symbol that was asked for.
    pub fn symbol(&self, name: &str) -> Option<FileAddr> {
        self.symbols.get(name).copied()
    }

    /// Its loaded segments.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Libraries that it names (`DT_NEEDED`).
    pub fn needed(&self) -> &[String] {
        &self.needed
    }

    /// Its own name as a library (`DT_SONAME`).
    pub fn soname(&self) -> Option<&str> {
        self.soname.as_deref()
    }

    /// Where it looks for libraries (`DT_RUNPATH`, `DT_RPATH`), `$ORIGIN` not replaced.
    pub fn runpath(&self) -> &[String] {
        &self.runpath
    }

    /// GNU build id; empty if it has none.
    pub fn build_id(&self) -> &[u8] {
        &self.build_id
    }

    /// Address of the section `.PyRuntime` (3.10 on).
    pub const fn py_runtime_section(&self) -> Option<FileAddr> {
        self.py_runtime
    }

    /// Where in the file the byte at `addr` is.
    pub fn file_offset(&self, addr: FileAddr) -> Option<FileOffset> {
        self.segments.iter().find_map(|s| {
            let within = addr.0.checked_sub(s.addr.0)?;
            (within < s.file_size).then(|| s.offset.0.checked_add(within).map(FileOffset)).flatten()
        })
    }

    /// Address of the byte at `offset` of the file.
    pub fn file_addr(&self, offset: FileOffset) -> Option<FileAddr> {
        self.segments.iter().find_map(|s| {
            let within = offset.0.checked_sub(s.offset.0)?;
            (within < s.file_size).then(|| s.addr.0.checked_add(within).map(FileAddr)).flatten()
        })
    }

    /// Whether `addr` is in an executable segment.
    pub fn is_code(&self, addr: FileAddr) -> bool {
        self.segments
            .iter()
            .any(|s| s.executable && addr.0.checked_sub(s.addr.0).is_some_and(|within| within < s.file_size))
    }

    /// Load bias of a mapping of this file: what to add to a [`FileAddr`] to get an address in memory.
    pub fn load_bias(&self, start: u64, offset: FileOffset, executable: bool) -> Option<u64> {
        const PAGE: u64 = 4096;
        self.segments
            .iter()
            .filter(|s| s.executable == executable)
            .find(|s| (s.offset.0 & !(PAGE - 1)..s.offset.0.saturating_add(s.file_size)).contains(&offset.0))
            .map(|s| start.wrapping_sub(offset.0).wrapping_add(s.offset.0).wrapping_sub(s.addr.0))
    }

    /// Fills `buf` with the file's data at `addr`.
    pub fn read_at(&self, addr: FileAddr, buf: &mut [u8]) -> Result<(), ElfError> {
        let no_data = || ElfError::NoData { path: self.path.clone(), addr, len: buf.len() };
        let last = FileAddr(addr.0.checked_add(buf.len() as u64).ok_or_else(no_data)?.saturating_sub(1));
        let offset = self.file_offset(addr).ok_or_else(no_data)?;
        let end = self.file_offset(last).ok_or_else(no_data)?;
        if end.0.wrapping_sub(offset.0) != last.0 - addr.0 {
            return Err(no_data());
        }
        self.file.read_exact_at(buf, offset.0).map_err(|source| ElfError::Io { path: self.path.clone(), source })
    }

    /// The C functions that the file's method tables (`PyMethodDef`: name, function, flags) have under a name and flags.
    ///
    /// Reads all data of the file once: for the few that must be known before a process runs.
    pub fn methods(&self, name: &str, flags: u32) -> Result<Vec<FileAddr>, ElfError> {
        const WORD: usize = 8;
        let mut text = name.as_bytes().to_vec();
        text.push(0);
        let relocated = self.relative_relocations()?;
        let mut data = Vec::new();
        for segment in self.segments.iter().filter(|segment| segment.file_size <= MAX_TABLE) {
            let mut bytes = vec![0; segment.file_size as usize];
            self.read_at(segment.addr, &mut bytes)?;
            data.push((segment, bytes));
        }
        let names: HashSet<u64> = data
            .iter()
            .flat_map(|(segment, bytes)| {
                memchr::memmem::find_iter(bytes, &text).map(|at| segment.addr.0.wrapping_add(at as u64))
            })
            .collect();
        let word = |addr: u64| {
            relocated.get(&addr).copied().or_else(|| {
                let mut bytes = [0; WORD];
                self.read_at(FileAddr(addr), &mut bytes).ok().map(|()| u64::from_le_bytes(bytes))
            })
        };
        // Pointers that a loader fills in are in its table; others are in the data.
        let in_table = relocated.iter().filter(|(_, value)| names.contains(value)).map(|(&addr, _)| addr);
        let in_data = data.iter().filter(|(segment, _)| !segment.executable).flat_map(|(segment, bytes)| {
            let words = bytes.chunks_exact(WORD).enumerate();
            let hits = words.filter(|(_, word)| names.contains(&u64::from_le_bytes((*word).try_into().expect("8"))));
            hits.map(|(index, _)| segment.addr.0.wrapping_add((index * WORD) as u64))
        });
        let mut found: Vec<FileAddr> = in_table
            .chain(in_data)
            .filter(|&def| word(def.wrapping_add(16)).is_some_and(|word| word as u32 == flags))
            .filter_map(|def| word(def.wrapping_add(8)).map(FileAddr))
            .filter(|&function| self.is_code(function))
            .collect();
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// What a loader adds its base to: address and value.
    fn relative_relocations(&self) -> Result<HashMap<u64, u64>, ElfError> {
        const ENTRY: usize = 24;
        let Some((table, size)) = self.relocations.filter(|&(_, size)| size <= MAX_TABLE) else {
            return Ok(HashMap::new());
        };
        let mut bytes = vec![0; size as usize];
        self.read_at(table, &mut bytes)?;
        let word = |entry: &[u8], at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().expect("8 bytes"));
        Ok(bytes
            .chunks_exact(ENTRY)
            .filter(|entry| word(entry, 8) == u64::from(elf::R_X86_64_RELATIVE.0))
            .map(|entry| (word(entry, 0), word(entry, 16)))
            .collect())
    }
}

enum Problem {
    NotElf,
    Damaged(&'static str),
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn own_executable_is_read() {
        let path = std::env::current_exe().unwrap();
        let elf = ElfFile::read(&path, &["main"]).unwrap();
        let main = elf.symbol("main").expect("test binaries have a symbol table");
        assert!(elf.is_code(main));
        assert_eq!(elf.file_addr(elf.file_offset(main).unwrap()), Some(main));
        assert!(elf.needed().iter().any(|lib| lib.starts_with("libc.")), "{:?}", elf.needed());
        let mut bytes = [0; 4];
        elf.read_at(main, &mut bytes).unwrap();
        assert_ne!(bytes, [0; 4]);
        assert!(elf.read_at(FileAddr(u64::MAX - 1), &mut bytes).is_err());
    }

    #[test]
    fn other_files_are_refused() {
        assert!(matches!(ElfFile::read(Path::new("/etc/passwd"), &[]), Err(ElfError::NotElf { .. })));
        assert!(matches!(ElfFile::read(Path::new("/proc"), &[]), Err(ElfError::NotElf { .. })));
        assert!(matches!(ElfFile::read(Path::new("/nonexistent"), &[]), Err(ElfError::Io { .. })));
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        assert!(matches!(ElfFile::read(&pipe, &[]), Err(ElfError::NotElf { .. })));
    }

    #[test]
    fn damaged_files_do_not_panic() {
        let whole = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("damaged");
        let head = &whole[..whole.len().min(1 << 16)];
        let mut seed = 1_u64;
        for round in 0..200 {
            let mut bytes = head.to_vec();
            for _ in 0..=round % 9 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let at = (seed >> 33) as usize % 4096.min(bytes.len());
                bytes[at] = (seed >> 24) as u8;
            }
            std::fs::write(&path, bytes).unwrap();
            let begin = Instant::now();
            let _ = ElfFile::read(&path, &["main"]);
            assert!(begin.elapsed().as_secs() < 5);
        }
    }
}
