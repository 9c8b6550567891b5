//! User names, read from `/etc/passwd` of the machine the agent runs on.

use std::collections::HashMap;

/// Names by number.
#[derive(Clone, Debug, Default)]
pub struct Users(HashMap<u32, String>);

impl Users {
    /// Of this machine. Where there is no `/etc/passwd`, users have only numbers.
    pub fn read() -> Self {
        Self::parse(&std::fs::read_to_string("/etc/passwd").unwrap_or_default())
    }

    fn parse(text: &str) -> Self {
        let entry = |line: &str| {
            let mut fields = line.split(':');
            let name = fields.next()?.to_owned();
            let uid = fields.nth(1)?.parse().ok()?;
            Some((uid, name))
        };
        Self(text.lines().filter_map(entry).collect())
    }

    /// The name of a user.
    pub fn name(&self, uid: u32) -> Option<&str> {
        self.0.get(&uid).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_by_number() {
        let users = Users::parse("root:x:0:0:root:/root:/bin/sh\nbroken\netl:x:1001:1001::/:\n");
        assert_eq!(users.name(0), Some("root"));
        assert_eq!(users.name(1001), Some("etl"));
        assert_eq!(users.name(7), None);
    }
}
