//! Quoting for every command that is printed for a user.

/// Returns one argument, unchanged if no shell would change it, quoted otherwise.
pub(crate) fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-+=:,./@%".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

/// Returns a command: its arguments, quoted where necessary, joined by spaces.
pub fn shell_command<'a>(args: impl IntoIterator<Item = &'a str>) -> String {
    args.into_iter().map(shell_word).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_quoted_for_a_shell() {
        let args = ["run", "-name", "a b", "", "it's", "~", "$(id)", "a;b", "tcp:[::1]:5"];
        assert_eq!(shell_command(args), "run -name 'a b' '' 'it'\\''s' '~' '$(id)' 'a;b' 'tcp:[::1]:5'");
    }
}
