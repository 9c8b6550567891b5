//! Runs a command under a seccomp profile, in the form in which container runtimes read it.
//!
//!     under-seccomp PROFILE.json COMMAND [ARGUMENT]...
//!
//! What the profile does not allow kills the command instead of failing in it, so that a system call that is missing shows.

use std::{collections::BTreeSet, env, error::Error, fs, os::unix::process::CommandExt as _, process::Command};

use seccompiler::{TargetArch, apply_filter, compile_from_json};
use serde_json::{Value, json};

fn main() -> Result<(), Box<dyn Error>> {
    let mut words = env::args_os().skip(1);
    let (Some(profile), Some(program)) = (words.next(), words.next()) else {
        return Err("usage: under-seccomp PROFILE.json COMMAND [ARGUMENT]...".into());
    };
    let profile: Value = serde_json::from_str(&fs::read_to_string(profile)?)?;
    let calls: Vec<_> = allowed(&profile)?.into_iter().map(|name| json!({"syscall": name})).collect();
    let filter = json!({"all": {"mismatch_action": "kill_process", "match_action": "allow", "filter": calls}});
    let programs = compile_from_json(filter.to_string().as_bytes(), TargetArch::x86_64)?;
    apply_filter(programs.get("all").ok_or("no filter")?)?;
    Err(Command::new(program).args(words).exec().into())
}

/// The system calls that a profile allows; an error if it says more than a list of these.
fn allowed(profile: &Value) -> Result<BTreeSet<String>, Box<dyn Error>> {
    if profile["defaultAction"] != "SCMP_ACT_ERRNO" || profile["architectures"] != json!(["SCMP_ARCH_X86_64"]) {
        return Err("not a profile that refuses everything but a list, for x86-64".into());
    }
    let mut names = BTreeSet::new();
    for rule in profile["syscalls"].as_array().ok_or("there are no system calls")? {
        let known = rule.as_object().is_some_and(|rule| rule.keys().all(|key| ["names", "action"].contains(&&**key)));
        if !known || rule["action"] != "SCMP_ACT_ALLOW" {
            return Err(format!("a rule that is not understood: {rule}").into());
        }
        for name in rule["names"].as_array().ok_or("a rule without names")? {
            let name = name.as_str().ok_or("a name that is no text")?.to_owned();
            if !names.insert(name.clone()) {
                return Err(format!("{name} is there twice").into());
            }
        }
    }
    Ok(names)
}
