//! `floe-agent probes`: which probes there are, and which of them fit a process or a Python environment.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};

use crate::{
    attach::survey::{self, Checked, Fit},
    catalogue::{self, Catalogue, Kind, Probe},
    process::identity,
    units::Pid,
};

/// How long the modules of an environment may take to be imported.
const IMPORT_PATIENCE: Duration = Duration::from_mins(2);
/// Exit code if a probe that applies does not resolve.
const SOME_FAIL: u8 = 1;
/// What an environment's interpreter runs: imports the modules it is given, says which failed, and waits. What the
/// modules print goes to standard error.
const IMPORT: &str = "\
import importlib, json, os, sys
out = os.fdopen(os.dup(1), 'w')
os.dup2(2, 1)
failed = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed[name] = ' '.join(f'{type(error).__name__}: {error}'.split())
out.write(json.dumps(failed) + '\\n')
out.flush()
sys.stdin.read()
";

#[derive(Debug, Subcommand)]
pub(super) enum ProbesCommand {
    /// List the probes: pack, name, kind, function.
    List {
        #[command(flatten)]
        options: CatalogueOptions,
    },
    /// Show all about one probe.
    Show {
        #[command(flatten)]
        options: CatalogueOptions,
        /// Its name, or `PACK:NAME` where several packs have a probe of this name.
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// Print the JSON schema of probe packs.
    Schema,
    /// Say which probes resolve in a process or in a Python environment, which do not and why, and the versions found.
    ///
    /// A process is only read: that needs the right to trace it, but no BPF. For an environment, its interpreter is
    /// started and imports the modules that the probes name, in a process of its own which ends afterwards; so code of
    /// these packages runs. Exit code 0: all probes that apply resolve; 1: some do not; 2: it could not be checked.
    Check {
        #[command(flatten)]
        options: CatalogueOptions,
        /// Print JSON.
        #[arg(long)]
        json: bool,
        /// A process, or the path of a virtual environment, of an installation, or of its python.
        #[arg(value_name = "PID|PATH")]
        target: String,
    },
}

/// Which probes.
#[derive(Args, Debug)]
pub(super) struct CatalogueOptions {
    /// This function as well: `package.module:Class.method`. May be given several times.
    #[arg(short, long, value_name = "SPEC")]
    probe: Vec<String>,
    /// The probes of this pack as well; a pack with the name of a built-in one replaces it.
    #[arg(long, value_name = "FILE.yaml")]
    pack: Vec<PathBuf>,
    /// Leave the built-in packs out.
    #[arg(long)]
    no_packs: bool,
}

impl CatalogueOptions {
    fn load(&self) -> Result<Catalogue> {
        let loaded = if self.no_packs {
            Catalogue::load_only(&self.pack, &self.probe)
        } else {
            Catalogue::load(&self.pack, &self.probe)
        }?;
        // Whoever asks about packs wants to know.
        loaded.left_out.into_iter().next().map_or(Ok(loaded.catalogue), |error| Err(error.into()))
    }
}

pub(super) fn run(command: &ProbesCommand) -> Result<u8> {
    match command {
        ProbesCommand::List { options } => list(&options.load()?),
        ProbesCommand::Show { options, name } => show(&options.load()?, name)?,
        ProbesCommand::Schema => println!("{:#}", catalogue::schema()),
        ProbesCommand::Check { options, json, target } => return check(&options.load()?, target, *json),
    }
    Ok(0)
}

/// The probes that somebody has written: the catalogue adds one of its own.
fn written(catalogue: &Catalogue) -> impl Iterator<Item = &Probe> {
    catalogue.probes().iter().filter(|probe| probe.kind != Kind::ContextExit)
}

const fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Call => "call",
        Kind::Event => "event",
        Kind::ContextManager => "contextmanager",
        Kind::ContextExit => "contextmanager end",
        Kind::PairBegin => "pair",
        Kind::PairEnd { .. } => "pair end",
    }
}

/// Prints rows of which all columns but the last are aligned.
fn table<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: [usize; COLUMNS] = std::array::from_fn(width);
    for row in rows {
        let cells: Vec<_> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        println!("{}", cells.join("  ").trim_end());
    }
}

fn list(catalogue: &Catalogue) {
    let head = ["PACK", "PROBE", "KIND", "FUNCTION"].map(str::to_owned);
    let rows = written(catalogue).map(|probe| {
        let target = if probe.implementations {
            format!("{} (all implementations)", probe.target)
        } else {
            probe.target.to_string()
        };
        [probe.pack.clone(), probe.name.clone(), kind(probe.kind).to_owned(), target]
    });
    table(&std::iter::once(head).chain(rows).collect::<Vec<_>>());
}

fn show(catalogue: &Catalogue, name: &str) -> Result<()> {
    let found: Vec<&Probe> = written(catalogue)
        .filter(|probe| probe.name == name || format!("{}:{}", probe.pack, probe.name) == name)
        .collect();
    let probe = match found[..] {
        [probe] => probe,
        [] => bail!("there is no probe `{name}`; `floe-agent probes list` lists them"),
        _ => {
            let names: Vec<_> = found.iter().map(|probe| format!("`{}:{}`", probe.pack, probe.name)).collect();
            bail!("there are several probes `{name}`: say {}", names.join(" or "));
        }
    };
    let mut rows = vec![
        ["name".to_owned(), probe.name.clone()],
        ["pack".to_owned(), probe.pack.clone()],
        ["written in".to_owned(), probe.place.clone()],
        ["kind".to_owned(), kind(probe.kind).to_owned()],
        ["function".to_owned(), probe.target.to_string()],
    ];
    let mut row = |name: &str, value: String| rows.push([name.to_owned(), value]);
    if probe.implementations {
        row("also", "every override of it in a subclass".to_owned());
    }
    if probe.scan {
        row("also", "its calls are the moment to look for new overrides".to_owned());
    }
    if !probe.found_in.is_empty() {
        row("found in", probe.found_in.join(", "));
    }
    if let Some(versions) = &probe.versions {
        row("versions", versions.to_string());
    }
    if let Some(span) = &probe.span {
        row("span", span.name.to_string());
        if let Some(key) = &span.key {
            row("span's key", key.to_string());
        }
        if let Some(parent) = &span.parent {
            row("span's parent", parent.to_string());
        }
    }
    if let Some(status) = &probe.status
        && let Some(from) = &status.from
    {
        row("error if", format!("{from} is {}", status.error.join(" or ")));
    }
    if !probe.rules.is_empty() {
        row("rules", probe.rules.len().to_string());
    }
    table(&rows);
    if !probe.attributes.is_empty() {
        println!("\nCaptured:");
        let rows: Vec<_> = probe
            .attributes
            .iter()
            .map(|attribute| {
                let at = format!("{:?}", attribute.at).to_lowercase();
                [format!("  {}", attribute.name), at, attribute.path.to_string()]
            })
            .collect();
        table(&rows);
    }
    Ok(())
}

fn check(catalogue: &Catalogue, target: &str, json: bool) -> Result<u8> {
    let checked = if let Ok(pid) = target.parse() {
        let pid = Pid(pid);
        anyhow::ensure!(
            identity::is_alive(pid),
            "cannot check process {pid}: there is no such process; `ps -e` lists those there are"
        );
        survey::check(catalogue, pid, &BTreeMap::new()).with_context(|| format!("cannot check process {pid}"))?
    } else {
        let python = interpreter_of(Path::new(target))?;
        check_environment(catalogue, &python)?
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&checked)?);
    } else {
        print(&checked);
    }
    let fails = checked.probes.iter().any(|probe| probe.verdict == Fit::Fails);
    Ok(if fails { SOME_FAIL } else { 0 })
}

fn print(checked: &Checked) {
    println!("CPython {}", checked.python);
    for pack in &checked.packs {
        let found = match (&pack.found, pack.supported) {
            (None, _) => "not there".to_owned(),
            (Some(found), Some(true)) => found.clone(),
            (Some(found), _) => format!("{found}, which was not tested"),
        };
        println!("{}: {found} (pack {}, tested with {})", pack.distribution, pack.pack, pack.tested);
    }
    println!();
    let rows: Vec<_> = checked
        .probes
        .iter()
        .map(|probe| {
            let verdict = match probe.verdict {
                Fit::Resolves => "ok",
                Fit::Fails => "FAILS",
                Fit::DoesNotApply => "-",
            };
            let more = match (&probe.reason, probe.functions.len()) {
                (Some(reason), _) => reason.clone(),
                (None, 1) => String::new(),
                (None, count) => format!("{count} functions"),
            };
            [verdict.to_owned(), probe.pack.clone(), probe.probe.clone(), probe.target.clone(), more]
        })
        .collect();
    table(&rows);
    let count = |fit| checked.probes.iter().filter(|probe| probe.verdict == fit).count();
    let (resolve, fail) = (count(Fit::Resolves), count(Fit::Fails));
    println!(
        "\n{resolve} of the {} probes that apply resolve; {} do not apply",
        resolve + fail,
        count(Fit::DoesNotApply)
    );
}

/// The interpreter that a path means.
fn interpreter_of(path: &Path) -> Result<PathBuf> {
    if path.is_file() {
        return Ok(path.to_owned());
    }
    let inside = ["bin/python3", "bin/python", "python3", "python"].map(|name| path.join(name));
    inside.into_iter().find(|python| python.is_file()).with_context(|| {
        format!(
            "cannot check `{}`: there is no bin/python3 in it; give a process id, the folder of a Python environment, or its python",
            path.display()
        )
    })
}

/// A child that is ended with this.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Lets an interpreter import what the probes are about, and looks at it.
fn check_environment(catalogue: &Catalogue, python: &Path) -> Result<Checked> {
    let versions = catalogue.packs().iter().filter_map(|pack| Some(pack.versions.as_ref()?.module.as_str()));
    let targets = written(catalogue).map(|probe| probe.target.module.as_str());
    let modules: BTreeSet<&str> = catalogue.modules().chain(versions).chain(targets).collect();
    let failed_to = || format!("cannot check {}", python.display());
    let mut child = Command::new(python)
        .args(["-B", "-c", IMPORT])
        .args(&modules)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map(Ending)
        .with_context(failed_to)?;
    let pid = Pid(child.0.id());
    let out = child.0.stdout.take().context("no pipe")?;
    let (line_in, line) = mpsc::channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = BufReader::new(out).read_line(&mut line);
        let _ = line_in.send(read.map(|_| line));
    });
    let line = match line.recv_timeout(IMPORT_PATIENCE) {
        Ok(line) => line.with_context(failed_to)?,
        Err(_) => bail!(
            "cannot check {}: importing {} modules took more than {} seconds",
            python.display(),
            modules.len(),
            IMPORT_PATIENCE.as_secs()
        ),
    };
    let Ok(failed) = serde_json::from_str(&line) else {
        bail!("cannot check {}: it ended while it imported modules, or is no Python", python.display());
    };
    survey::check(catalogue, pid, &failed).with_context(failed_to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_environment_is_its_python_or_a_folder_with_one() {
        let folder = tempfile::tempdir().unwrap();
        let error = interpreter_of(folder.path()).unwrap_err().to_string();
        assert!(error.contains("there is no bin/python3 in it; give"), "{error}");
        std::fs::create_dir(folder.path().join("bin")).unwrap();
        let python = folder.path().join("bin/python");
        std::fs::write(&python, "").unwrap();
        assert_eq!(interpreter_of(folder.path()).unwrap(), python);
        assert_eq!(interpreter_of(&python).unwrap(), python);
    }

    #[test]
    fn a_probe_is_shown_by_its_name() {
        let catalogue = Catalogue::of_probes(&["m:f(x=arg0)".to_owned()]).unwrap();
        show(&catalogue, "m:f").unwrap();
        let error = show(&catalogue, "m:g").unwrap_err().to_string();
        assert_eq!(error, "there is no probe `m:g`; `floe-agent probes list` lists them");
    }
}
