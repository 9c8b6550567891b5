//! Functions in C that must be watched while anything is armed: those that switch C stacks, and on 3.11 those that change
//! what a stack has to hold.

use std::{collections::HashSet, path::PathBuf};

use super::files::OpenFile;
use crate::{
    kernel::{Kernel, KernelError, Site},
    process::maps,
    python::elf::{ElfFile, FileIdentity},
    units::{FileOffset, Pid, UserAddr},
};

/// Entries of `greenlet._C_API` that switch: `PyGreenlet_Throw`, `PyGreenlet_Switch` (greenlet.h, greenlet 0.4 to 3).
pub(super) const GREENLET_API_SWITCHES: [u64; 2] = [5, 6];

/// Guards that are attached, by file and offset: one serves all processes.
#[derive(Default)]
pub(super) struct Guards(HashSet<(Site, FileIdentity, FileOffset)>);

impl Guards {
    /// Attaches `site` to the C function at an address of a process.
    pub(super) fn attach(
        &mut self,
        kernel: &mut Kernel,
        pid: Pid,
        site: Site,
        function: UserAddr,
    ) -> Result<(), GuardError> {
        let Place { open, identity, offset } = Place::of(pid, function)?;
        self.attach_at(kernel, site, &open, identity, offset)
    }

    /// Whether `site` is attached to the C function at an address of a process.
    pub(super) fn is_attached(&self, pid: Pid, site: Site, function: UserAddr) -> bool {
        Place::of(pid, function).is_ok_and(|place| self.0.contains(&(site, place.identity, place.offset)))
    }

    /// Attaches `site` to the C function at an offset of a file.
    pub(super) fn attach_at(
        &mut self,
        kernel: &mut Kernel,
        site: Site,
        open: &OpenFile,
        identity: FileIdentity,
        offset: FileOffset,
    ) -> Result<(), GuardError> {
        let key = (site, identity, offset);
        if self.0.contains(&key) {
            return Ok(());
        }
        // A pointer of a hostile process could lead into the middle of an instruction: only where the file has code.
        let elf = ElfFile::read(&open.path(), &[]).map_err(|_| GuardError::Unreadable(open.path()))?;
        if elf.file_addr(offset).is_none_or(|addr| !elf.is_code(addr)) {
            return Err(GuardError::NotCode(open.path(), offset));
        }
        kernel.attach(site, &open.path(), offset, None).map_err(GuardError::Kernel)?;
        self.0.insert(key);
        Ok(())
    }
}

/// A C function in a file.
struct Place {
    open: OpenFile,
    identity: FileIdentity,
    offset: FileOffset,
}

impl Place {
    fn of(pid: Pid, function: UserAddr) -> Result<Self, GuardError> {
        let mapping = maps::read(pid)
            .ok()
            .and_then(|maps| maps.into_iter().find(|m| m.contains(function) && m.execute && m.inode != 0))
            .ok_or(GuardError::NotInFile(function))?;
        let open = OpenFile::open(&mapping.map_file(pid)).or_else(|_| OpenFile::open(&mapping.path_in_root(pid)));
        let unreadable = |_| GuardError::Unreadable(mapping.path.clone());
        let open = open.map_err(unreadable)?;
        let identity = open.identity().map_err(unreadable)?;
        Ok(Self { open, identity, offset: FileOffset(function.0 - mapping.start.0 + mapping.offset.0) })
    }
}

/// Why a guard could not be attached.
#[derive(Debug, thiserror::Error)]
pub(super) enum GuardError {
    #[error("the function at {0} is not in the code of a mapped file")]
    NotInFile(UserAddr),
    #[error("{1} of {0} is not code")]
    NotCode(PathBuf, FileOffset),
    #[error("{0} cannot be read")]
    Unreadable(PathBuf),
    #[error(transparent)]
    Kernel(KernelError),
}
