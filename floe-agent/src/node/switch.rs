//! The kill switch: a file that exists, or a signal, stop all tracing; when neither says so any more it begins again.

use std::path::PathBuf;

/// What says that nothing is to be traced.
#[derive(Debug, Default)]
pub struct Switch {
    file: Option<PathBuf>,
    by_file: bool,
    by_signal: bool,
}

impl Switch {
    /// With a file that stops tracing while it exists.
    pub fn new(file: Option<PathBuf>) -> Self {
        let mut switch = Self { file, ..Self::default() };
        switch.look();
        switch
    }

    /// Another file from now on.
    pub fn set_file(&mut self, file: Option<PathBuf>) {
        self.file = file;
    }

    /// Looks whether the file exists.
    pub fn look(&mut self) {
        self.by_file = self.file.as_ref().is_some_and(|file| file.symlink_metadata().is_ok());
    }

    /// The signal came: the other way round.
    pub fn signal(&mut self) {
        self.by_signal = !self.by_signal;
    }

    /// Whether tracing is to be stopped.
    pub fn is_off(&self) -> bool {
        self.by_file || self.by_signal
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn either_the_file_or_the_signal_stops_tracing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("stop");
        let mut switch = Switch::new(Some(file.clone()));
        assert!(!switch.is_off());
        std::fs::write(&file, "").unwrap();
        switch.look();
        assert!(switch.is_off());
        switch.signal();
        std::fs::remove_file(&file).unwrap();
        switch.look();
        assert!(switch.is_off(), "the signal still says so");
        switch.signal();
        assert!(!switch.is_off());
        std::fs::write(&file, "").unwrap();
        assert!(Switch::new(Some(file)).is_off(), "also from the start");
    }
}
