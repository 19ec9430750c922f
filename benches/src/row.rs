//! One row of the report: samples of the same operation by several programs, and what is aimed at.

use std::time::Duration;

use crate::child::Cost;

/// The label of our own samples.
pub const OURS: &str = "domsnap";
/// The label of the least-work probe's samples.
pub const LIMIT: &str = "limit";

/// All samples of one program.
#[derive(Debug, Clone)]
pub struct Series {
    /// Which program, with its options.
    pub label: String,
    /// One a repetition.
    pub walls: Vec<Duration>,
    /// The largest of all repetitions, in bytes.
    pub peak: u64,
    /// How often one run flushes, where counted.
    pub flushes: Option<usize>,
    /// What one run wrote to the device, in bytes, where counted.
    pub written: Option<u64>,
}

impl Series {
    /// The middle one, in seconds; the lower of two middles.
    pub fn median(&self) -> f64 {
        let mut walls = self.walls.clone();
        walls.sort_unstable();
        walls.get(walls.len().saturating_sub(1) / 2).map_or(f64::NAN, Duration::as_secs_f64)
    }

    /// Fastest and slowest, in seconds.
    pub fn spread(&self) -> (f64, f64) {
        let seconds = self.walls.iter().map(Duration::as_secs_f64);
        (seconds.clone().fold(f64::INFINITY, f64::min), seconds.fold(0.0, f64::max))
    }
}

/// What a row aims at.
#[derive(Debug, Clone)]
pub enum Target {
    /// The fastest peer takes at least so many times as long.
    Faster(f64),
    /// The series with this label takes at least so many times as long.
    FasterThan(f64, &'static str),
    /// At most so many times the time of the series with this label.
    Within(f64, &'static str),
    /// A time of its own.
    Under(Duration),
    /// Peak memory, in bytes.
    Memory(u64),
    /// Flushes of one run.
    Flushes(usize),
    /// Bytes written to the device by one run, as a share of the peer's data.
    Written(u64),
    /// Something counted beside the samples: what, at most.
    Count(&'static str, usize),
}

/// Whether one target is met.
#[derive(Debug, Clone)]
pub struct Verdict {
    /// The target as text.
    pub target: String,
    /// What was found, as text.
    pub found: String,
    /// Whether that meets it; `None`: not measured.
    pub met: Option<bool>,
}

impl Verdict {
    /// In one word, or two.
    pub fn word(&self) -> &'static str {
        match self.met {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "not measured",
        }
    }
}

/// One row of the report.
#[derive(Debug, Clone)]
pub struct Row {
    name: &'static str,
    what: String,
    series: Vec<Series>,
    targets: Vec<Target>,
    counts: Vec<(&'static str, usize)>,
    notes: Vec<String>,
}

impl Row {
    /// A row with no samples yet.
    pub fn new(name: &'static str, what: impl Into<String>, targets: &[Target]) -> Row {
        let (series, counts, notes) = (Vec::new(), Vec::new(), Vec::new());
        Row { name, what: what.into(), series, targets: targets.to_vec(), counts, notes }
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// What is measured, as text.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// All series, in the order of their first samples.
    pub fn series(&self) -> &[Series] {
        &self.series
    }

    /// What must be known to read it.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    fn of(&mut self, label: &str) -> &mut Series {
        let index = match self.series.iter().position(|series| series.label == label) {
            Some(index) => index,
            None => {
                let label = label.to_owned();
                self.series.push(Series { label, walls: Vec::new(), peak: 0, flushes: None, written: None });
                self.series.len() - 1
            }
        };
        &mut self.series[index]
    }

    /// One more sample.
    pub fn sample(&mut self, label: &str, cost: Cost) {
        let series = self.of(label);
        series.walls.push(cost.wall);
        series.peak = series.peak.max(cost.peak);
    }

    /// How often one run flushes.
    pub fn flushes(&mut self, label: &str, count: usize) {
        self.of(label).flushes = Some(count);
    }

    /// What one run wrote to the device; the most of all runs counts.
    pub fn written(&mut self, label: &str, bytes: u64) {
        let series = self.of(label);
        series.written = Some(series.written.unwrap_or(0).max(bytes));
    }

    /// Something else that was counted.
    pub fn count(&mut self, what: &'static str, count: usize) {
        self.counts.push((what, count));
    }

    /// Something that must be known to read the row.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    fn find(&self, label: &str) -> Option<&Series> {
        self.series.iter().find(|series| series.label == label && !series.walls.is_empty())
    }

    /// Our own samples.
    pub fn ours(&self) -> Option<&Series> {
        self.find(OURS)
    }

    /// The least work's samples.
    pub fn limit(&self) -> Option<&Series> {
        self.find(LIMIT)
    }

    /// The fastest of the programs that are compared: those called qemu-img.
    pub fn best_peer(&self) -> Option<&Series> {
        self.series
            .iter()
            .filter(|series| series.label.starts_with("qemu-img") && !series.walls.is_empty())
            .min_by(|a, b| a.median().total_cmp(&b.median()))
    }

    /// One verdict a target.
    pub fn verdicts(&self) -> Vec<Verdict> {
        self.targets.iter().map(|target| self.verdict(target)).collect()
    }

    fn verdict(&self, target: &Target) -> Verdict {
        let ours = self.ours();
        let ratio = |other: Option<&Series>| Some(other?.median() / ours?.median());
        let (target, found) = match target {
            Target::Faster(times) => {
                let args = match times {
                    1.0 => "no slower than the best of qemu-img".to_owned(),
                    times => format!("at least {times} times faster than the best of qemu-img"),
                };
                (args, ratio(self.best_peer()).map(|r| (format!("{r:.2} times faster"), r >= *times)))
            }
            Target::FasterThan(times, label) => {
                let found = ratio(self.find(label));
                (
                    format!("at least {times} times faster than {label}"),
                    found.map(|r| (format!("{r:.2} times faster"), r >= *times)),
                )
            }
            Target::Within(times, label) => {
                let found = ratio(self.find(label)).map(|r| 1.0 / r);
                (
                    format!("within {times} of {label}"),
                    found.map(|r| (format!("{r:.2} times as long"), r <= *times)),
                )
            }
            Target::Under(time) => {
                let found = ours.map(Series::median);
                let found = found.map(|found| (seconds(found), found <= time.as_secs_f64()));
                (format!("under {}", seconds(time.as_secs_f64())), found)
            }
            Target::Memory(bytes) => {
                let found = ours.map(|ours| (mebibytes(ours.peak), ours.peak <= *bytes));
                (format!("peak memory under {}", mebibytes(*bytes)), found)
            }
            Target::Flushes(most) => {
                let found = ours.and_then(|ours| ours.flushes);
                (format!("at most {most} flushes"), found.map(|n| (format!("{n} flushes"), n <= *most)))
            }
            Target::Written(most) => {
                let found = ours.and_then(|ours| ours.written);
                let found = found.map(|n| (format!("{} written", mebibytes(n)), n <= *most));
                (
                    format!("no data copied: at most {} of metadata written to the device", mebibytes(*most)),
                    found,
                )
            }
            Target::Count(what, most) => {
                let found = self.counts.iter().find(|(counted, _)| counted == what);
                (format!("at most {most} {what}"), found.map(|(_, n)| (format!("{n} {what}"), n <= most)))
            }
        };
        match found {
            Some((found, met)) => Verdict { target, found, met: Some(met) },
            None => Verdict { target, found: "-".to_owned(), met: None },
        }
    }
}

/// A time in its own unit, three digits.
pub fn seconds(seconds: f64) -> String {
    match seconds {
        s if s.is_nan() => "-".to_owned(),
        s if s >= 100.0 => format!("{s:.0} s"),
        s if s >= 10.0 => format!("{s:.1} s"),
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 0.1 => format!("{:.0} ms", s * 1e3),
        s if s >= 0.01 => format!("{:.1} ms", s * 1e3),
        s => format!("{:.2} ms", s * 1e3),
    }
}

/// Bytes as MiB.
pub fn mebibytes(bytes: u64) -> String {
    let mebibytes = bytes as f64 / f64::from(1 << 20);
    if mebibytes >= 10.0 { format!("{mebibytes:.0} MiB") } else { format!("{mebibytes:.1} MiB") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(targets: &[Target], ours: &[u64], peers: &[(&str, u64)]) -> Row {
        let mut row = Row::new("name", "what", targets);
        let cost = |ms| Cost { wall: Duration::from_millis(ms), peak: 1 << 20, cpu: Duration::ZERO };
        ours.iter().for_each(|ms| row.sample(OURS, cost(*ms)));
        peers.iter().for_each(|(label, ms)| row.sample(label, cost(*ms)));
        row
    }

    #[test]
    fn the_median_is_the_middle_sample() {
        assert_eq!(row(&[], &[9, 1, 4], &[]).ours().unwrap().median(), 0.004);
        assert_eq!(row(&[], &[9, 1, 4, 5], &[]).ours().unwrap().median(), 0.004);
    }

    #[test]
    fn the_fastest_peer_is_what_counts() {
        let peers = [("qemu-img slow", 500), ("qemu-img fast", 50), ("cp + sync", 1)];
        let verdicts = row(&[Target::Faster(10.0)], &[10], &peers).verdicts();
        assert_eq!((verdicts[0].met, verdicts[0].found.as_str()), (Some(false), "5.00 times faster"));
    }

    /// Within is measured against the series that it names.
    #[test]
    fn within_names_its_series() {
        let verdicts = row(&[Target::Within(1.3, "cp + sync")], &[12], &[("cp + sync", 10)]).verdicts();
        assert_eq!(verdicts[0].met, Some(true));
        let verdicts = row(&[Target::Within(1.3, "cp + sync")], &[14], &[("cp + sync", 10)]).verdicts();
        assert_eq!(verdicts[0].met, Some(false));
    }

    /// Faster than is measured against the series that it names.
    #[test]
    fn faster_than_names_its_series() {
        let peers = [("cp", 1000), ("qemu-img", 20)];
        let verdicts = row(&[Target::FasterThan(100.0, "cp")], &[10], &peers).verdicts();
        assert_eq!(verdicts[0].met, Some(true));
        let verdicts = row(&[Target::FasterThan(100.0, "cp")], &[11], &peers).verdicts();
        assert_eq!(verdicts[0].met, Some(false));
    }

    #[test]
    fn what_was_not_measured_has_no_verdict() {
        let targets = [Target::Faster(2.0), Target::Flushes(4), Target::Count("files", 2)];
        assert!(row(&targets, &[10], &[]).verdicts().iter().all(|verdict| verdict.met.is_none()));
    }
}
