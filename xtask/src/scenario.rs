//! Scenario files: a guest script and what to expect. `tests/emulated/README.md` documents the format.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// `file` or `file/variant`; filled in by `load`.
    #[serde(skip)]
    pub name: String,
    pub about: String,
    #[serde(default)]
    pub suites: Vec<String>,
    /// Seconds from the start of the VMM to the end of everything.
    #[serde(default = "default_limit")]
    pub limit: u64,
    /// Seconds for each script that runs in the emulated host.
    #[serde(default = "default_limit")]
    pub script_limit: u64,
    #[serde(default)]
    pub kernel: Kernel,
    #[serde(default)]
    pub boot: Option<String>,
    #[serde(default = "default_cpus")]
    pub cpus: u32,
    #[serde(default = "default_memory")]
    pub memory: String,
    #[serde(default)]
    pub cmdline: String,
    /// More options of `actor-vmm run`.
    #[serde(default)]
    pub args: Vec<String>,
    #[serde(default)]
    pub stdin: Stdin,
    /// Kernel modules of the stock kernel that the guest loads before its script.
    #[serde(default)]
    pub modules: Vec<String>,
    /// The emulated host has a small Debian system on its disk /dev/vda (`cargo xtask image`).
    #[serde(default)]
    pub system: bool,
    /// The emulated host has gdb in it.
    #[serde(default)]
    pub gdb: bool,
    /// The emulated host has qemu-img in it.
    #[serde(default)]
    pub qemu_img: bool,
    /// Runs in the guest by busybox sh.
    #[serde(default)]
    pub guest: String,
    /// Run in the emulated host by busybox sh, before and after the VMM.
    #[serde(default)]
    pub before: String,
    #[serde(default)]
    pub after: String,
    #[serde(default, rename = "step")]
    pub steps: Vec<Step>,
    #[serde(default)]
    pub status: Option<i32>,
    #[serde(default)]
    pub expect: Vec<String>,
    #[serde(default)]
    pub reject: Vec<String>,
    /// The VMM has to be gone so many milliseconds after the last step.
    #[serde(default)]
    pub ends_within_ms: Option<u64>,
    #[serde(default)]
    pub vars: BTreeMap<String, String>,
    /// Which VMM this cannot be shown with, although it is a good scenario (`qemu` does not know our statuses).
    #[serde(default)]
    pub only_actor_vmm: bool,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Kernel {
    #[default]
    Bzimage,
    Vmlinux,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Stdin {
    /// A pipe that stays open and silent until a step sends something.
    #[default]
    Pipe,
    /// A terminal, which also has to be found in its old state afterwards.
    Pty,
    /// /dev/null.
    Null,
}

/// What is done to the running VMM: first the waits, then each of the others that is given, in this order.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    pub wait: Option<String>,
    /// On the VMM's stderr.
    pub wait_log: Option<String>,
    pub sleep_ms: Option<u64>,
    pub run: Option<String>,
    pub send: Option<String>,
    /// A file that `before` left in $WORK.
    pub send_file: Option<String>,
    pub signal: Option<String>,
}

fn default_limit() -> u64 {
    60
}

fn default_cpus() -> u32 {
    1
}

fn default_memory() -> String {
    "256M".to_owned()
}

impl Scenario {
    pub fn memory_mib(&self) -> Result<u64> {
        memory_mib(&self.memory).with_context(|| format!("{}: memory", self.name))
    }

    /// Puts the variables into a text that is not a shell script (scripts get them in their environment).
    pub fn substitute(&self, text: &str) -> String {
        let mut out = text.to_owned();
        for (name, value) in self.variables() {
            out = out.replace(&format!("${{{name}}}"), &value);
        }
        out
    }

    pub fn variables(&self) -> BTreeMap<String, String> {
        let mut all = self.vars.clone();
        all.insert("CPUS".to_owned(), self.cpus.to_string());
        all.insert(
            "MEMORY_MIB".to_owned(),
            self.memory_mib().unwrap_or(0).to_string(),
        );
        all
    }

    /// The same guest script without comments: what goes into the guest.
    pub fn guest_script(&self) -> String {
        let mut script = String::new();
        for (name, value) in self.variables() {
            script.push_str(&format!("{name}='{value}'\n"));
        }
        for module in &self.modules {
            script.push_str(&format!("insmod /modules/{module}.ko\n"));
        }
        script.push_str(&self.guest);
        script
    }
}

pub fn memory_mib(text: &str) -> Result<u64> {
    let (digits, unit) = match text.strip_suffix('G') {
        Some(digits) => (digits, 1024),
        None => (text.strip_suffix('M').unwrap_or(text), 1),
    };
    let number: u64 = digits
        .parse()
        .with_context(|| format!("\"{text}\" is not a size such as 256M or 4G"))?;
    Ok(number * unit)
}

/// Every scenario of the directory, variants spelled out, in order of name of file and then of appearance.
pub fn load(dir: &Path) -> Result<Vec<Scenario>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "toml") {
            files.push(path);
        }
    }
    files.sort();
    let mut all = Vec::new();
    for path in files {
        let stem = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        all.extend(parse(&stem, &text).with_context(|| format!("{} is not a scenario", path.display()))?);
    }
    Ok(all)
}

/// One file: a scenario, or one per `[[variant]]`, each of which overrides keys of the common part.
pub fn parse(stem: &str, text: &str) -> Result<Vec<Scenario>> {
    let mut base: toml::Table = toml::from_str(text)?;
    let variants = match base.remove("variant") {
        None => Vec::new(),
        Some(toml::Value::Array(variants)) => variants,
        Some(_) => bail!("`variant` has to be written [[variant]]"),
    };
    if variants.is_empty() {
        return Ok(vec![finish(stem.to_owned(), base)?]);
    }
    let mut all = Vec::new();
    for variant in variants {
        let toml::Value::Table(mut overrides) = variant else {
            bail!("`variant` has to be written [[variant]]")
        };
        let Some(toml::Value::String(name)) = overrides.remove("name") else {
            bail!("a variant needs a name")
        };
        let mut table = base.clone();
        for (key, value) in overrides {
            match (table.get_mut(&key), value) {
                (Some(toml::Value::Table(old)), toml::Value::Table(new)) => old.extend(new),
                (_, value) => {
                    table.insert(key, value);
                }
            }
        }
        all.push(finish(format!("{stem}/{name}"), table)?);
    }
    Ok(all)
}

fn finish(name: String, table: toml::Table) -> Result<Scenario> {
    let mut scenario: Scenario = table.try_into().with_context(|| name.clone())?;
    scenario.name = name;
    scenario.memory_mib()?;
    for value in scenario.vars.values() {
        ensure!(
            !value.contains('\''),
            "{}: a variable may not contain a single quote",
            scenario.name
        );
    }
    Ok(scenario)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_override_and_inherit() {
        let text = r#"
            about = "boots"
            memory = "128M"
            guest = "echo hi"
            expect = ["cpus ${CPUS} ${WHAT}"]
            vars = { WHAT = "a", MORE = "m" }
            [[step]]
            wait = "x"
            send = "y\n"
            [[variant]]
            name = "one"
            [[variant]]
            name = "four"
            cpus = 4
            memory = "4G"
            vars = { WHAT = "b" }
        "#;
        let all = parse("boot", text).unwrap();
        let names: Vec<_> = all.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(names, ["boot/one", "boot/four"]);
        assert_eq!(all[1].memory_mib().unwrap(), 4096);
        assert_eq!(all[1].substitute(&all[1].expect[0]), "cpus 4 b");
        assert_eq!(all[0].substitute(&all[0].expect[0]), "cpus 1 a");
        assert_eq!(all[1].steps.len(), 1);
        assert!(all[1].guest_script().contains("MORE='m'\n"));
    }

    #[test]
    fn mistakes_are_named() {
        let unknown = parse("s", "about = 'x'\nexpekt = []").unwrap_err();
        assert!(format!("{unknown:#}").contains("expekt"), "{unknown:#}");
        let memory = parse("s", "about = 'x'\nmemory = 'lots'").unwrap_err();
        assert!(format!("{memory:#}").contains("lots"), "{memory:#}");
    }

    #[test]
    fn the_scenarios_of_the_repository_are_well_formed() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/emulated");
        let all = load(&dir).unwrap();
        let mut names: Vec<_> = all.iter().map(|s| &s.name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all.len(), "two scenarios have one name");
    }
}
