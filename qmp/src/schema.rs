//! The abilities of a QEMU, from its `query-qmp-schema`, never concluded from its version.

use std::collections::HashMap;

use serde_json::Value;

/// Alternates of alternates do not exist; this limit only ends a walk through a malicious, endless schema.
const MAX_ALTERNATES: usize = 8;

/// The commands, events, arguments and enum values of one QEMU.
///
/// A *path* names a member of a command's arguments (or of its reply), with a dot between levels. Lists are
/// entered implicitly. A member of one branch of a union is found in any branch; a step `tag=value` enters
/// one branch only:
///
/// ```
/// # let reply = serde_json::json!([
/// #   {"meta-type": "command", "name": "blockdev-add", "arg-type": "1", "ret-type": "0"},
/// #   {"meta-type": "object", "name": "0", "members": []},
/// #   {"meta-type": "object", "name": "1", "tag": "driver", "members": [{"name": "driver", "type": "2"}],
/// #    "variants": [{"case": "qcow2", "type": "3"}, {"case": "raw", "type": "0"}]},
/// #   {"meta-type": "enum", "name": "2", "values": ["qcow2", "raw"]},
/// #   {"meta-type": "object", "name": "3", "members": [{"name": "backing", "type": "str"}]}]);
/// # let schema = qmp::Schema::from_value(&reply).unwrap();
/// assert!(schema.has_command("blockdev-add"));
/// assert!(schema.has_argument("blockdev-add", "driver=qcow2.backing"));
/// assert!(!schema.has_argument("blockdev-add", "driver=raw.backing"));
/// assert!(schema.has_value("blockdev-add", "driver", "qcow2"));
/// ```
#[derive(Debug, Clone)]
pub struct Schema {
    types: HashMap<String, Entity>,
    commands: HashMap<String, Entity>,
    events: HashMap<String, Entity>,
}

#[derive(Debug, Clone, Default)]
struct Entity {
    features: Vec<String>,
    argument: Option<String>,
    reply: Option<String>,
    shape: Shape,
}

#[derive(Debug, Clone, Default)]
enum Shape {
    #[default]
    Other,
    Object {
        members: Vec<Member>,
        tag: Option<String>,
        /// Pairs of case and type.
        variants: Vec<(String, String)>,
    },
    Array(String),
    Alternate(Vec<String>),
    Enum(Vec<String>),
}

#[derive(Debug, Clone)]
struct Member {
    name: String,
    of: String,
    features: Vec<String>,
}

fn text(value: &Value, key: &str) -> Option<String> {
    value.get(key)?.as_str().map(str::to_owned)
}

fn list<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value.get(key).and_then(Value::as_array).into_iter().flatten()
}

fn texts(value: &Value, key: &str) -> Vec<String> {
    list(value, key).filter_map(Value::as_str).map(str::to_owned).collect()
}

impl Entity {
    fn from_value(value: &Value, kind: &str) -> Self {
        let shape = match kind {
            "object" => Shape::Object {
                members: list(value, "members").filter_map(Member::from_value).collect(),
                tag: text(value, "tag"),
                variants: list(value, "variants")
                    .filter_map(|variant| Some((text(variant, "case")?, text(variant, "type")?)))
                    .collect(),
            },
            "array" => text(value, "element-type").map(Shape::Array).unwrap_or_default(),
            "alternate" => Shape::Alternate(list(value, "members").filter_map(|m| text(m, "type")).collect()),
            // "members" replaces "values"; old versions have only the latter.
            "enum" => Shape::Enum(
                list(value, "members")
                    .filter_map(|m| text(m, "name"))
                    .chain(texts(value, "values"))
                    .collect(),
            ),
            _ => Shape::Other,
        };
        Self {
            features: texts(value, "features"),
            argument: text(value, "arg-type"),
            reply: text(value, "ret-type"),
            shape,
        }
    }
}

impl Member {
    fn from_value(value: &Value) -> Option<Self> {
        Some(Self {
            name: text(value, "name")?,
            of: text(value, "type")?,
            features: texts(value, "features"),
        })
    }
}

impl Schema {
    /// Parses the reply of `query-qmp-schema`. Entities of unknown kinds are skipped.
    ///
    /// # Errors
    /// A description of the error if it is not a list, or names no command.
    pub fn from_value(reply: &Value) -> Result<Self, String> {
        let entities = reply.as_array().ok_or("the schema is not a list")?;
        let mut schema = Self { types: HashMap::new(), commands: HashMap::new(), events: HashMap::new() };
        for value in entities {
            let (Some(name), Some(kind)) = (text(value, "name"), text(value, "meta-type")) else { continue };
            let entity = Entity::from_value(value, &kind);
            match kind.as_str() {
                "command" => schema.commands.insert(name, entity),
                "event" => schema.events.insert(name, entity),
                _ => schema.types.insert(name, entity),
            };
        }
        if schema.commands.is_empty() {
            return Err("the schema names no command".to_owned());
        }
        Ok(schema)
    }

    /// Returns true if the command exists.
    pub fn has_command(&self, command: &str) -> bool {
        self.commands.contains_key(command)
    }

    /// Returns true if the event exists.
    pub fn has_event(&self, event: &str) -> bool {
        self.events.contains_key(event)
    }

    /// Returns true if a command itself has a feature flag (`deprecated`, ...).
    pub fn has_feature(&self, command: &str, feature: &str) -> bool {
        self.commands.get(command).is_some_and(|entity| entity.features.iter().any(|known| known == feature))
    }

    /// Returns true if a command has the argument at a path.
    pub fn has_argument(&self, command: &str, path: &str) -> bool {
        self.arguments(command).is_some_and(|start| !self.walk(start, path).is_empty())
    }

    /// Returns true if the argument at a path has a feature flag.
    pub fn has_argument_feature(&self, command: &str, path: &str, feature: &str) -> bool {
        self.arguments(command).is_some_and(|start| {
            self.walk(start, path).iter().any(|found| found.features.iter().any(|known| known == feature))
        })
    }

    /// Returns true if the argument at a path is an enum (or a list of one) with this value.
    pub fn has_value(&self, command: &str, path: &str, value: &str) -> bool {
        self.arguments(command).is_some_and(|start| {
            self.walk(start, path).iter().any(|found| {
                self.plain(found.of).into_iter().any(|(_, entity)| match &entity.shape {
                    Shape::Enum(values) => values.iter().any(|known| known == value),
                    Shape::Other | Shape::Object { .. } | Shape::Array(_) | Shape::Alternate(_) => false,
                })
            })
        })
    }

    /// Returns true if a command's reply has the member at a path.
    pub fn has_reply(&self, command: &str, path: &str) -> bool {
        let reply = self.commands.get(command).and_then(|entity| entity.reply.as_deref());
        reply.is_some_and(|start| !self.walk(start, path).is_empty())
    }

    fn arguments(&self, command: &str) -> Option<&str> {
        self.commands.get(command)?.argument.as_deref()
    }

    /// Returns the members that a path may name.
    fn walk<'a>(&'a self, start: &'a str, path: &str) -> Vec<Found<'a>> {
        let mut at = vec![Found { of: start, features: &[] }];
        for step in path.split('.') {
            let mut next = Vec::new();
            for found in at {
                for (name, entity) in self.plain(found.of) {
                    match step.split_once('=') {
                        Some((tag, case)) => {
                            next.extend(entity.branch(tag, case).map(|of| Found { of, features: &[] }))
                        }
                        None => self.members(name, entity, step, &mut next),
                    }
                }
            }
            at = next;
        }
        at
    }

    /// Returns a type; for a list or an alternate, the types in it.
    fn plain<'a>(&'a self, name: &'a str) -> Vec<(&'a str, &'a Entity)> {
        let (mut open, mut plain) = (vec![name], Vec::new());
        for _ in 0..MAX_ALTERNATES {
            for name in std::mem::take(&mut open) {
                let Some(entity) = self.types.get(name) else { continue };
                match &entity.shape {
                    Shape::Array(element) => open.push(element),
                    Shape::Alternate(of) => open.extend(of.iter().map(String::as_str)),
                    Shape::Other | Shape::Object { .. } | Shape::Enum(_) => plain.push((name, entity)),
                }
            }
            open.sort_unstable();
            open.dedup();
        }
        plain
    }

    /// Finds the members of that name of an object: its own, and those of every branch. Branches have no
    /// branches.
    fn members<'a>(&'a self, of: &str, entity: &'a Entity, name: &str, found: &mut Vec<Found<'a>>) {
        let Shape::Object { members, variants, .. } = &entity.shape else { return };
        let mut take = |members: &'a [Member]| {
            let named = members.iter().filter(|member| member.name == name);
            found.extend(named.map(|member| Found { of: &member.of, features: &member.features }));
        };
        take(members);
        for (_, branch) in variants {
            let Some(entity) = self.types.get(branch).filter(|_| branch != of) else { continue };
            if let Shape::Object { members, .. } = &entity.shape {
                take(members);
            }
        }
        found.sort_unstable_by_key(|found| found.of);
        found.dedup_by_key(|found| found.of);
    }
}

/// A member that a path names.
#[derive(Debug, Clone, Copy)]
struct Found<'a> {
    of: &'a str,
    features: &'a [String],
}

impl Entity {
    fn branch<'a>(&'a self, tag: &str, case: &str) -> Option<&'a str> {
        let Shape::Object { tag: Some(known), variants, .. } = &self.shape else { return None };
        let variant = variants.iter().find(|(name, _)| known == tag && name == case)?;
        Some(&variant.1)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn schema() -> Schema {
        Schema::from_value(&json!([
            {"meta-type": "command", "name": "reopen", "arg-type": "1", "ret-type": "7", "features": ["slow"]},
            {"meta-type": "command", "name": "stop", "arg-type": "0", "ret-type": "0"},
            {"meta-type": "event", "name": "STOP", "arg-type": "0"},
            {"meta-type": "object", "name": "0", "members": []},
            {"meta-type": "object", "name": "1", "members": [{"name": "options", "type": "[2]"}]},
            {"meta-type": "array", "name": "[2]", "element-type": "2"},
            {"meta-type": "object", "name": "2", "tag": "driver",
             "members": [{"name": "driver", "type": "3"}, {"name": "backing", "type": "4", "features": ["old"]}],
             "variants": [{"case": "qcow2", "type": "5"}, {"case": "raw", "type": "0"}, {"case": "odd", "type": "gone"}]},
            {"meta-type": "enum", "name": "3", "members": [{"name": "qcow2"}, {"name": "raw"}]},
            {"meta-type": "alternate", "name": "4", "members": [{"type": "2"}, {"type": "str"}]},
            {"meta-type": "object", "name": "5", "members": [{"name": "lazy", "type": "6"}]},
            {"meta-type": "enum", "name": "6", "values": ["on", "off"]},
            {"meta-type": "array", "name": "7", "element-type": "5"},
            {"meta-type": "builtin", "name": "str", "json-type": "string"},
            {"meta-type": "hologram", "name": "9"},
            "noise", {"name": 5}
        ]))
        .expect("a schema")
    }

    #[test]
    fn commands_events_and_features_are_known_by_name() {
        let schema = schema();
        assert!(schema.has_command("stop") && !schema.has_command("STOP") && !schema.has_command("go"));
        assert!(schema.has_event("STOP") && !schema.has_event("stop"));
        assert!(schema.has_feature("reopen", "slow") && !schema.has_feature("stop", "slow"));
    }

    #[test]
    fn a_path_goes_through_lists_branches_and_alternates() {
        let schema = schema();
        for path in ["options", "options.driver", "options.lazy", "options.backing.backing.lazy"] {
            assert!(schema.has_argument("reopen", path), "{path}");
        }
        for path in ["", "driver", "options.loud", "options.lazy.on", "options.", "backing"] {
            assert!(!schema.has_argument("reopen", path), "{path}");
        }
        assert!(!schema.has_argument("stop", "options") && !schema.has_argument("go", "options"));
        assert!(schema.has_reply("reopen", "lazy") && !schema.has_reply("stop", "lazy"));
        assert!(schema.has_argument_feature("reopen", "options.backing", "old"));
        assert!(!schema.has_argument_feature("reopen", "options.driver", "old"));
    }

    #[test]
    fn a_branch_can_be_chosen() {
        let schema = schema();
        assert!(schema.has_argument("reopen", "options.driver=qcow2.lazy"));
        for path in
            ["options.driver=raw.lazy", "options.driver=odd.lazy", "options.type=qcow2.lazy", "driver=qcow2"]
        {
            assert!(!schema.has_argument("reopen", path), "{path}");
        }
    }

    /// Enum values are read in their new form and in their old one.
    #[test]
    fn enum_values_are_read_in_both_forms() {
        let schema = schema();
        assert!(schema.has_value("reopen", "options.driver", "raw"));
        assert!(schema.has_value("reopen", "options.lazy", "off"));
        assert!(!schema.has_value("reopen", "options.driver", "vhd"));
        assert!(!schema.has_value("reopen", "options.backing", "raw"), "a member that is no enum");
    }

    /// A walk through an endless schema ends.
    #[test]
    fn endless_schema_is_walked_to_an_end() {
        let circle = json!([
            {"meta-type": "command", "name": "c", "arg-type": "a"},
            {"meta-type": "alternate", "name": "a", "members": [{"type": "b"}, {"type": "a"}]},
            {"meta-type": "array", "name": "b", "element-type": "a"},
        ]);
        let schema = Schema::from_value(&circle).expect("a command");
        assert!(!schema.has_argument("c", "x.y.z"));
    }

    /// A reply that is not a schema is refused.
    #[test]
    fn invalid_schema_is_refused() {
        for reply in [json!({}), json!([]), json!([1, "a"]), json!(null)] {
            Schema::from_value(&reply).expect_err("no command in it");
        }
    }
}
