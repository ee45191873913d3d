use std::fs;

use serde_json::{Value, json};

use super::*;

fn valid() -> Value {
    let convolution = |adds: &str| {
        json!({"dtype": "f16", "batch_size": 8, "in_channels": 320, "height": 64, "width": 64, "out_channels": 320,
               "kernel_size": 3, "stride": 1, "padding": 1, "adds": adds})
    };
    let pinned = |adds: &str| {
        json!({"convolution": convolution(adds), "choice": {"engine": 41, "knobs": {"2": 4, "27": 1}},
               "microseconds": 100.0, "libtorch_microseconds": 200.0})
    };
    json!({"gpu": "NVIDIA H200", "cudnn": "9.19.0", "pinned": [pinned("nothing"), pinned("bias_and_residual")]})
}

fn read(json: &str) -> Result<ConvolutionEngines, String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("engines.json");
    fs::write(&file, json).unwrap();
    let read = ConvolutionEngines::read(&file);
    read.map_err(|error| error.to_string().replace(&folder.path().display().to_string(), ""))
}

#[test]
fn a_file_is_read_as_it_was_written() {
    let engines = read(&valid().to_string()).unwrap();
    assert_eq!(engines.pinned[1].choice.knobs, BTreeMap::from([(2, 4), (27, 1)]));
    let again = serde_json::to_string(&engines).unwrap();
    assert_eq!(read(&again).unwrap(), engines);
}

#[test]
fn all_faults_of_a_file_are_told_at_once() {
    let mut json = valid();
    json["pinned"][0]["convolution"]["dtype"] = "f32".into();
    json["pinned"][0]["convolution"]["stride"] = 0.into();
    json["pinned"][0]["choice"]["engine"] = (-1).into();
    json["pinned"][1]["convolution"]["padding"] = (-1).into();
    let twin = json["pinned"][1].clone();
    json["pinned"].as_array_mut().unwrap().push(twin);
    let error = read(&json.to_string()).unwrap_err();
    for part in [
        "the convolutions' engines in /engines.json cannot be used:",
        "`pinned[0].convolution.dtype` must be f16 or bf16 but is f32",
        "`pinned[0].convolution.stride` must be from 1 to 1048576 but is 0",
        "`pinned[0].choice.engine` must be 0 or more but is -1",
        "`pinned[1].convolution.padding` must be from 0 to 1048576 but is -1",
        "`pinned[2].convolution` must be named once but is `f16 8×320×64×64 → 320, 3×3, stride 1, bias and residual` again",
        "hint: `darkroom-worker tune` on this kind of GPU writes such a file",
    ] {
        assert!(error.contains(part), "{part} is not in:\n{error}");
    }
}

#[test]
fn what_is_no_such_file_is_refused_in_words() {
    for (json, part) in [
        ("{", "is not a file of `darkroom-worker tune`: EOF"),
        ("{}", "missing field `gpu`"),
        (r#"{"gpu": "a", "cudnn": "b", "pinned": [], "more": 1}"#, "unknown field `more`"),
    ] {
        let error = read(json).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
    let error = ConvolutionEngines::read(Path::new("/no/such/file")).unwrap_err().to_string();
    assert!(error.contains("cannot be read: No such file"), "{error}");
}

#[test]
fn a_file_is_for_one_gpu_and_one_cudnn() {
    let engines = read(&valid().to_string()).unwrap();
    assert!(engines.faults_on("NVIDIA H200", "9.19.0").is_empty());
    let faults: Vec<String> =
        engines.faults_on("NVIDIA L4", "9.20.0").iter().map(ToString::to_string).collect();
    assert_eq!(
        faults,
        [
            "`gpu` must be `NVIDIA L4`, as here but is `NVIDIA H200`",
            "`cudnn` must be `9.20.0`, as here but is `9.19.0`"
        ]
    );
}

#[test]
fn the_name_tells_what_is_pinned_and_nothing_else() {
    let name = |json: Value| read(&json.to_string()).unwrap().name();
    let first = name(valid());
    assert_eq!(first.len(), 12);
    let mut other = valid();
    other["pinned"].as_array_mut().unwrap().reverse();
    other["pinned"][0]["microseconds"] = 7.0.into();
    assert_eq!(name(other), first, "the order and the times do not count");
    for (pointer, value) in [
        ("/gpu", json!("NVIDIA H100")),
        ("/cudnn", json!("9.20.0")),
        ("/pinned/0/choice/engine", json!(42)),
        ("/pinned/0/choice/knobs/2", json!(5)),
        ("/pinned/0/convolution/padding", json!(0)),
        ("/pinned/0/convolution/batch_size", json!(9)),
    ] {
        let mut json = valid();
        *json.pointer_mut(pointer).unwrap() = value;
        assert_ne!(name(json), first, "{pointer}");
    }
}
