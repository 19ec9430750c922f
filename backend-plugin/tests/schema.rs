//! The checked-in schema is the protocol's.

use backend_plugin::protocol;

/// The schema that authors read is that of the protocol in use.
#[test]
fn published_schema_matches_the_protocol() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/plugin-schema.json");
    let spoken = serde_json::to_string_pretty(&protocol::schema()).unwrap() + "\n";
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(file, &spoken).unwrap();
    }
    let written = std::fs::read_to_string(file).unwrap();
    assert!(
        written == spoken,
        "docs/plugin-schema.json is not the protocol's: write it again with BLESS=1, and think of the plug-ins that speak the \
         old one"
    );
}

#[test]
fn the_schema_has_every_method() {
    let schema = protocol::schema();
    let methods = schema["properties"].as_object().unwrap();
    for method in
        ["hello", "adopt", "plan", "apply", "undo", "status", "lock", "release", "progress", "cancel"]
    {
        assert!(methods.contains_key(method), "{method} is missing");
    }
    let plan = &schema["$defs"]["DiskPlan"]["properties"];
    for field in ["prepare", "instant", "cut", "commit", "finish", "point"] {
        assert!(!plan[field].is_null(), "a plan's {field} is missing: {plan}");
    }
    let step = &schema["$defs"]["FinishStep"]["properties"];
    for field in ["target", "action", "summary", "bytes", "edits", "deferrable"] {
        assert!(!step[field].is_null(), "a finish step's {field} is missing: {step}");
    }
}
