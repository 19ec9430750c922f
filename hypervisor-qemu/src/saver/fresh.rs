//! A fresh generation ID in the command of a QEMU that is started from memory ([`crate::generation_id`]).

use serde_json::Value;
use uuid::Uuid;

/// The device.
const DRIVER: &str = "vmgenid";

/// QEMU's word for an ID that it makes itself at each start.
const AUTO: &str = "auto";

/// Replaces the generation ID of a command. Returns true if the command has such a device: the QEMU that it
/// starts has an ID then that no other start had.
pub(crate) fn generation_id(args: &mut [String]) -> bool {
    let fresh = Uuid::new_v4().to_string();
    let mut found = false;
    for at in 1..args.len() {
        let Some([option, word]) = args.get_mut(at - 1..=at) else { continue };
        let option = option.strip_prefix("--").or_else(|| option.strip_prefix('-'));
        match option {
            Some("device") => {
                if let Some(renewed) = device(word, &fresh) {
                    (*word, found) = (renewed, true);
                }
            }
            // Decides only for a device that has none of its own.
            Some("global") if word.starts_with("vmgenid.guid=") => *word = format!("vmgenid.guid={fresh}"),
            _ => {}
        }
    }
    found
}

/// The value of a `-device` with a fresh ID; none if it is another device.
fn device(word: &str, fresh: &str) -> Option<String> {
    if word.trim_start().starts_with('{') {
        let mut device: Value = serde_json::from_str(word).ok()?;
        if device["driver"] != DRIVER {
            return None;
        }
        let id = device.get_mut("guid");
        if let Some(id) = id.filter(|id| id.as_str() != Some(AUTO)) {
            *id = Value::from(fresh);
        }
        return Some(device.to_string());
    }
    let is_it = |part: &str, first: bool| part == "driver=vmgenid" || first && part == DRIVER;
    word.split(',').enumerate().any(|(place, part)| is_it(part, place == 0)).then_some(())?;
    let renewed = word.split(',').map(|part| match part.strip_prefix("guid=") {
        Some(id) if id != AUTO => format!("guid={fresh}"),
        _ => part.to_owned(),
    });
    Some(renewed.collect::<Vec<_>>().join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87";

    fn renewed(command: &[&str]) -> (bool, String) {
        let mut args: Vec<String> = command.iter().map(|word| (*word).to_owned()).collect();
        let found = generation_id(&mut args);
        assert_eq!(args.len(), command.len());
        (found, args.join(" "))
    }

    /// An ID is replaced in each form of the option, and nothing else is changed.
    #[test]
    fn ids_are_replaced_in_each_form() {
        for (option, before, after) in [
            ("-device", "vmgenid,id=gen,guid=", ""),
            ("--device", "vmgenid,guid=", ",id=gen"),
            ("-device", "id=gen,driver=vmgenid,guid=", ""),
            ("-device", r#"{"driver":"vmgenid","guid":""#, r#"","id":"gen"}"#),
        ] {
            let (found, now) = renewed(&["qemu", option, &format!("{before}{OLD}{after}"), "-S"]);
            assert!(found && !now.contains(OLD), "{now}");
            let id = now.strip_prefix(&format!("qemu {option} {before}")).expect("the same");
            let id = id.strip_suffix(&format!("{after} -S")).expect("the same");
            Uuid::parse_str(id).expect("an ID");
        }
    }

    /// QEMU makes one itself where none is given; other devices and options are left alone.
    #[test]
    fn other_words_are_left_alone() {
        for word in ["vmgenid", "vmgenid,guid=auto", r#"{"driver":"vmgenid","guid":"auto"}"#] {
            assert_eq!(renewed(&["qemu", "-device", word]), (true, format!("qemu -device {word}")));
        }
        let name = format!("vmgenid,guid={OLD}");
        let other = format!("other,guid={OLD}");
        for command in [["qemu", "-name", &name], ["qemu", "-device", &other], ["qemu", "-device", "{"]] {
            assert_eq!(renewed(&command), (false, command.join(" ")));
        }
        assert_eq!(renewed(&[]), (false, String::new()));
        assert!(!renewed(&["q", "-global", &format!("vmgenid.guid={OLD}")]).1.contains(OLD));
    }
}
