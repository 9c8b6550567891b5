//! Which functions a probe stands for in a process. Only reads.

use std::{collections::BTreeMap, time::Duration};

use serde::Serialize;

use crate::{
    catalogue::{Catalogue, Kind, Pack, Probe},
    python::{
        identify::{Interpreter, Refusal, locate},
        memory::{CachedMemory, ProcessMemory},
        resolve::{FoundFunction, ResolveError, Resolver},
    },
    units::Pid,
};

/// What became of a probe in an interpreter.
#[derive(Clone, Debug)]
pub enum Finding {
    /// It stands for these functions; none, if it stands for the implementations of a method that has none.
    Functions(Vec<FoundFunction>),
    /// A module that it needs is not imported.
    NotImported {
        /// Which.
        module: String,
    },
    /// It is not for the version that is there.
    OtherVersion {
        /// The version.
        found: String,
    },
    /// Its name leads to no function.
    Unresolved(ResolveError),
}

/// A catalogue, and an interpreter in which its functions are looked for.
#[derive(Clone, Copy)]
pub struct Survey<'a, 'm> {
    catalogue: &'a Catalogue,
    modules: &'a Resolver<'m>,
}

impl<'a, 'm> Survey<'a, 'm> {
    /// Looks for the functions of `catalogue` with `modules`.
    pub const fn new(catalogue: &'a Catalogue, modules: &'a Resolver<'m>) -> Self {
        Self { catalogue, modules }
    }

    /// The functions that a probe stands for.
    pub fn find(&self, probe: &Probe) -> Finding {
        if let Some(range) = &probe.versions
            && let Some(pack) = self.catalogue.packs().iter().find(|pack| pack.name == probe.pack)
            && let Some(found) = self.version(pack)
            && range.contains(&found) == Some(false)
        {
            return Finding::OtherVersion { found };
        }
        if let Some(module) = probe.modules().find(|module| !self.is_imported(module)) {
            return Finding::NotImported { module: module.to_owned() };
        }
        let (module, qualname) = (&probe.target.module, &probe.target.qualname);
        let found = match probe.kind {
            _ if probe.implementations => self.modules.implementations(module, qualname),
            Kind::ContextManager => self.modules.context_manager(module, qualname).map(|found| vec![found]),
            _ => {
                let found_in: Vec<_> = probe.found_in.iter().map(String::as_str).collect();
                self.modules.resolve(module, qualname, &found_in)
            }
        };
        found.map_or_else(Finding::Unresolved, Finding::Functions)
    }

    /// Whether a module is imported.
    pub fn is_imported(&self, module: &str) -> bool {
        matches!(self.modules.module(module), Ok(Some(_)))
    }

    /// The version of a pack's distribution, if its module is imported.
    pub fn version(&self, pack: &Pack) -> Option<String> {
        let versions = pack.versions.as_ref()?;
        self.modules.module_attribute_str(&versions.module, &versions.attribute).ok()
    }
}

/// Whether calls of a function can be what a probe asks for: those of generators and coroutines return at once.
pub fn is_usable(probe: &Probe, function: &FoundFunction) -> bool {
    let at_once = matches!(probe.kind, Kind::Call | Kind::ContextManager) && !function.kind.runs_in_call();
    !at_once
}

/// What became of the probes of a catalogue in one process.
#[derive(Clone, Debug, Serialize)]
pub struct Checked {
    /// The interpreter's version.
    pub python: String,
    /// What the packs are for.
    pub packs: Vec<CheckedPack>,
    /// The probes, in the catalogue's order.
    pub probes: Vec<CheckedProbe>,
}

/// The distribution that a pack is for.
#[derive(Clone, Debug, Serialize)]
pub struct CheckedPack {
    /// The pack.
    pub pack: String,
    /// What it is for.
    pub distribution: String,
    /// The versions that it was tested with.
    pub tested: String,
    /// The version that is there, if its module is imported.
    pub found: Option<String>,
    /// Whether that one was tested.
    pub supported: Option<bool>,
}

/// A probe in a process.
#[derive(Clone, Debug, Serialize)]
pub struct CheckedProbe {
    /// Its pack.
    pub pack: String,
    /// Its name.
    pub probe: String,
    /// Its function.
    pub target: String,
    /// What became of it.
    pub verdict: Fit,
    /// Why it does not resolve or does not apply.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The functions: file, line and qualified name.
    pub functions: Vec<String>,
}

/// Whether a probe fits a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fit {
    /// It leads to functions.
    Resolves,
    /// It should, and does not.
    Fails,
    /// Nothing that it is for is there.
    DoesNotApply,
}

/// Reads of a process that runs may not fit together: so often is it read at most.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(20);

/// Looks up the probes of a catalogue in a process, without changing anything in it. `failed` are modules that could not
/// be imported there, with the reasons.
pub fn check(catalogue: &Catalogue, pid: Pid, failed: &BTreeMap<String, String>) -> Result<Checked, Refusal> {
    let mut tries = 1..=TRIES;
    loop {
        let checked = check_once(catalogue, pid, failed);
        let whole = match &checked {
            Ok(checked) => checked.probes.iter().all(|probe| probe.verdict != Fit::Fails),
            Err(refusal) => !matches!(refusal, Refusal::NotReady { .. } | Refusal::SelfCheckFailed { .. }),
        };
        tries.next();
        if whole || tries.is_empty() {
            return checked;
        }
        std::thread::sleep(PAUSE);
    }
}

fn check_once(catalogue: &Catalogue, pid: Pid, failed: &BTreeMap<String, String>) -> Result<Checked, Refusal> {
    let memory = ProcessMemory::new(pid);
    let located = locate(pid, &[])?;
    let cached = CachedMemory::new(&memory);
    let interpreter = Interpreter::verify(&cached, &located.file, located.bias)?;
    interpreter.gate(&cached, &located.file)?;
    let resolver = Resolver::new(interpreter.heap(&cached), interpreter.modules(&cached, interpreter.main)?);
    let survey = Survey::new(catalogue, &resolver);
    let packs: Vec<_> = catalogue
        .packs()
        .iter()
        .filter_map(|pack| {
            let versions = pack.versions.as_ref()?;
            let found = survey.version(pack);
            Some(CheckedPack {
                pack: pack.name.clone(),
                distribution: versions.distribution.clone(),
                tested: versions.supported.to_string(),
                supported: found.as_ref().map(|found| versions.supported.contains(found) == Some(true)),
                found,
            })
        })
        .collect();
    // What an interpreter that only imports was made to import, and what a running program has not imported yet.
    let is_absent = |probe: &Probe| packs.iter().any(|pack| pack.pack == probe.pack && pack.found.is_none());
    let probes = catalogue.probes().iter().filter(|probe| probe.kind != Kind::ContextExit);
    let probes = probes.map(|probe| judge(probe, survey.find(probe), failed, is_absent(probe))).collect();
    Ok(Checked { python: interpreter.version(), packs, probes })
}

/// What a finding says of a probe; `is_absent`: the distribution that its pack is for is not there.
fn judge(probe: &Probe, finding: Finding, failed: &BTreeMap<String, String>, is_absent: bool) -> CheckedProbe {
    let mut functions = Vec::new();
    let (verdict, reason) = match finding {
        Finding::Functions(found) => {
            let unusable = found.iter().find(|function| !is_usable(probe, function));
            let reason = unusable
                .map(|function| format!("{} is a generator or coroutine: its calls return at once", function.qualname));
            functions.extend(found.iter().map(|f| format!("{}:{} {}", f.filename, f.line, f.qualname)));
            match (found.iter().any(|function| is_usable(probe, function)), reason) {
                (false, None) => (Fit::Resolves, Some("it has no implementation yet".to_owned())),
                (false, reason) => (Fit::Fails, reason),
                (true, reason) => (Fit::Resolves, reason),
            }
        }
        Finding::OtherVersion { found } => (Fit::DoesNotApply, Some(format!("it is not for version {found}"))),
        Finding::NotImported { module } => match failed.get(&module) {
            Some(_) if is_absent => (Fit::DoesNotApply, Some("its distribution is not there".to_owned())),
            Some(error) => (Fit::Fails, Some(format!("{module} cannot be imported: {error}"))),
            None => (Fit::DoesNotApply, Some(format!("{module} is not imported"))),
        },
        Finding::Unresolved(error) => (Fit::Fails, Some(error.to_string())),
    };
    CheckedProbe {
        pack: probe.pack.clone(),
        probe: probe.name.clone(),
        target: probe.target.to_string(),
        verdict,
        reason,
        functions,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{python::resolve::FunctionKind, units::UserAddr};

    fn probe() -> Probe {
        Catalogue::of_probes(&["m:f".to_owned()]).unwrap().probes()[0].clone()
    }

    fn function(kind: FunctionKind) -> FoundFunction {
        FoundFunction {
            function: UserAddr(1),
            code: UserAddr(2),
            vectorcall: UserAddr(3),
            func_version_addr: None,
            name: "f".into(),
            qualname: "f".into(),
            filename: "m.py".into(),
            line: 7,
            code_flags: 0,
            kind,
            class: None,
            arguments: Vec::new(),
            positional: 0,
            exact: true,
        }
    }

    #[test]
    fn a_probe_fits_if_one_function_of_it_can_be_watched() {
        let judged = |found| {
            let checked = judge(&probe(), Finding::Functions(found), &BTreeMap::new(), false);
            (checked.verdict, checked.reason.is_some(), checked.functions.len())
        };
        let (plain, generator) = (function(FunctionKind::Plain), function(FunctionKind::Generator));
        assert_eq!(judged(vec![plain.clone()]), (Fit::Resolves, false, 1));
        assert_eq!(judged(vec![plain, generator.clone()]), (Fit::Resolves, true, 2));
        assert_eq!(judged(vec![generator]), (Fit::Fails, true, 1));
        assert_eq!(judged(vec![]), (Fit::Resolves, true, 0));
    }

    #[test]
    fn what_is_not_there_does_not_apply_unless_it_should_be_there() {
        let failed = BTreeMap::from([("m".to_owned(), "ImportError: x".to_owned())]);
        let judged = |failed: &BTreeMap<_, _>, is_absent| {
            judge(&probe(), Finding::NotImported { module: "m".into() }, failed, is_absent).verdict
        };
        assert_eq!(judged(&BTreeMap::new(), false), Fit::DoesNotApply);
        assert_eq!(judged(&failed, true), Fit::DoesNotApply);
        assert_eq!(judged(&failed, false), Fit::Fails);
        let other = judge(&probe(), Finding::OtherVersion { found: "1".into() }, &failed, false);
        assert_eq!(other.verdict, Fit::DoesNotApply);
    }
}
