//! The reader of golden files. Whatever is wrong with a file, a sentence names the file and the field.

use crate::support::case::{Case, files};
use crate::support::data::Source;
use serde_json::{Value, json};
use std::path::Path;

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn example() -> Result<Value, Box<dyn std::error::Error>> {
    Ok(serde_json::from_str(&std::fs::read_to_string(golden("samtone_both_weighted_shared_positive.json"))?)?)
}

fn error_of(text: &str) -> String {
    Case::parse(text).err().unwrap_or_else(|| "no error".into())
}

#[test]
fn each_fault_names_its_field() -> Outcome {
    let faults: &[(&str, Value, &str)] = &[
        ("/q/2/1", json!("0.5"), "field `q[2][1]`: invalid type: string"),
        ("/q/2/1", json!(null), "field `q[2][1]`: invalid type: null"),
        ("/p/8", json!([1.0]), "field `p[8]`: 1 numbers; allowed: 7, as `dim` says"),
        ("/rows", json!(5), "field `row_losses`: 6 numbers; allowed: 5"),
        ("/rows", json!(-5), "field `rows`: invalid value"),
        ("/passages", json!(8), "field `grad_p`: 9 rows; allowed: 8, as `passages` says"),
        ("/dim", json!(6), "field `grad_q[0]`: 7 numbers; allowed: 6, as `dim` says"),
        ("/groups/1/blocks/0", json!("qd"), "field `groups[1].blocks[0]`: unknown variant `qd`"),
        ("/groups/1/positive_copies", json!(3), "field `groups[1]`: argument `positive_copies` is 3"),
        ("/groups/0/coefficient", json!(-1), "field `groups[0]`: argument `coefficient` is -1"),
        ("/groups/0/coefficient", json!(2), "but the preset of that name is"),
        ("/groups", json!([]), "field `groups`: argument `groups` is []"),
        ("/temperature", json!(0), "field `temperature`: argument `temperature` is 0"),
        ("/positives/1", json!(9), "argument `positives` is 9 at row 1; allowed: 0 to 8"),
        ("/positives", json!([0]), "argument `positives` is a slice of 1 elements"),
        ("/weights/2", json!(0.1), "field `weights[2]`: 0.1 is not an f32 number; allowed: weights rounded to f32"),
        ("/weights/2", json!(-2), "argument `weights` is -2 at row 2"),
        ("/query_ids", json!([1, 2]), "argument `query_ids` is a slice of 2 elements; allowed: 6"),
        ("/hard_negative_owner", json!([7, 0, 0, 0, 0, 0, 0, 0, 0]), "argument `owners` is 7 at passage 0"),
        ("/hard_negative_scope", json!("mine"), "field `hard_negative_scope`: unknown variant `mine`"),
    ];
    for (pointer, value, want) in faults {
        let mut file = example()?;
        *file.pointer_mut(pointer).ok_or(*pointer)? = value.clone();
        let error = error_of(&file.to_string());
        assert!(error.contains(want), "{pointer} = {value}: {error}");
    }
    Ok(())
}

/// What a framework writes are the shortest decimals of its numbers, of f32 ones also as f64; both name one number exactly.
#[test]
fn every_number_is_read_exactly() -> Outcome {
    let mut source = Source::new(5);
    for _ in 0..50 {
        let mut file = example()?;
        let wide: Vec<f64> = source.normal(42);
        let narrow: Vec<f64> = source.normal(6).iter().map(|&x| f64::from((x as f32).abs())).collect();
        file["q"] = wide.chunks(7).map(<[f64]>::to_vec).collect();
        file["weights"] = narrow.clone().into();
        let case = Case::parse(&file.to_string())?;
        assert_eq!(case.problem.query, wide);
        let pairs = case.problem.pairs()?;
        assert_eq!((0..pairs.rows()).map(|i| pairs.weight(i)).collect::<Vec<_>>(), narrow);
    }
    Ok(())
}

#[test]
fn a_byte_order_mark_is_no_part_of_the_file() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("marked.json");
    std::fs::write(&path, format!("\u{feff}{}", example()?))?;
    assert_eq!(Case::read(&path)?.problem.rows, 6);
    Ok(())
}

#[test]
fn shared_ids_want_the_ids_of_both_towers() -> Outcome {
    let mut file = example()?;
    let fields = file.as_object_mut().ok_or("not an object")?;
    for (ids, error) in [
        (json!(null), "argument `shared_ids` is true without query ids and passage ids; allowed: false, or"),
        (json!([1, 2, 3, 4, 5, 6]), "argument `shared_ids` is true without passage ids; allowed: false, or"),
    ] {
        fields.insert("query_ids".into(), ids);
        fields.insert("shared_ids".into(), json!(true));
        assert!(error_of(&Value::from(fields.clone()).to_string()).contains(error), "{error}");
        fields.insert("shared_ids".into(), json!(false));
        assert!(!Case::parse(&Value::from(fields.clone()).to_string())?.problem.call.shared_ids());
    }
    fields.insert("shared_ids".into(), json!(1));
    assert!(error_of(&Value::from(fields.clone()).to_string()).contains("field `shared_ids`: invalid type"));
    Ok(())
}

/// Prefixes come with a loss for each, and with lengths and weights that the crate takes.
#[test]
fn prefixes_and_their_losses_belong_together() -> Outcome {
    let text = std::fs::read_to_string(golden("samtone_both_prefixes.json"))?;
    let faults: &[(&str, Value, &str)] = &[
        ("/prefix_losses", json!(null), "field `prefix_losses`: none; allowed: as many as in `prefixes`, 4 entries"),
        ("/prefixes", json!(null), "field `prefix_losses`: 4 entries; allowed: as many as in `prefixes`, none"),
        ("/prefix_losses", json!([1.0, 2.0]), "field `prefix_losses`: 2 entries; allowed: as many as in `prefixes`, 4"),
        ("/prefix_losses/1", json!("2"), "field `prefix_losses[1]`: invalid type: string"),
        ("/prefixes/0/dim", json!(0), "field `prefixes`: argument `prefixes` is 0 at position 0; allowed: ascending"),
        ("/prefixes/0/dim", json!(-1), "field `prefixes[0].dim`: invalid value"),
        ("/prefixes/0/dim", json!(1.5), "field `prefixes[0].dim`: invalid type: floating point"),
        ("/prefixes/1/dim", json!(1), "field `prefixes`: argument `prefixes` is 1 at position 1; allowed: ascending"),
        ("/prefixes/3/dim", json!(99), "argument `prefixes` is 99 at position 3; allowed: at most 12, the dimension"),
        ("/prefixes/2/weight", json!(-0.5), "field `prefixes`: argument `prefix_weights` is -0.5 at position 2"),
        ("/prefixes/2/weight", json!(null), "field `prefixes[2].weight`: invalid type: null"),
        ("/prefixes/1", json!({"dim": 3, "weight": 1, "loss": 2}), "unknown field `loss`, expected `dim` or"),
        ("/prefixes/1", json!({"dim": 3}), "field `prefixes[1]`: missing field `weight`"),
        ("/prefixes/1", json!(3), "field `prefixes[1]`: invalid type: integer"),
    ];
    for (pointer, value, want) in faults {
        let mut file: Value = serde_json::from_str(&text)?;
        *file.pointer_mut(pointer).ok_or(*pointer)? = value.clone();
        let error = error_of(&file.to_string());
        assert!(error.contains(want), "{pointer} = {value}: {error}");
    }
    for (prefixes, want) in [
        (json!([]), "field `prefixes`: argument `prefixes` is an empty list"),
        (json!([{"dim": 2, "weight": 0}]), "field `prefixes`: argument `prefix_weights` is 0 for every prefix"),
    ] {
        let mut file: Value = serde_json::from_str(&text)?;
        file["prefix_losses"] = vec![1.0; prefixes.as_array().map_or(0, Vec::len)].into();
        file["prefixes"] = prefixes;
        let error = error_of(&file.to_string());
        assert!(error.contains(want), "{error}");
    }
    Ok(())
}

/// What a file says of a prefix of weight 0 is compared with nothing, because the crate leaves such a prefix out.
#[test]
fn a_prefix_of_weight_zero_has_no_result() -> Outcome {
    let mut file: Value = serde_json::from_str(&std::fs::read_to_string(golden("samtone_both_prefixes.json"))?)?;
    let all = Case::parse(&file.to_string())?;
    assert_eq!(all.problem.call.prefixes(), Some(&[3, 5, 8, 12][..]));
    file["prefixes"][1]["weight"] = json!(0);
    let fewer = Case::parse(&file.to_string())?;
    assert_eq!(fewer.problem.call.prefixes(), all.problem.call.prefixes());
    let [first, _, third, last] = all.expected.prefix_losses[..] else { return Err("not four prefixes".into()) };
    assert_eq!(fewer.expected.prefix_losses, [first, third, last]);
    Ok(())
}

#[test]
fn missing_unknown_and_extra_text_is_refused() -> Outcome {
    let mut file = example()?;
    let fields = file.as_object_mut().ok_or("not an object")?;
    let loss = fields.remove("loss").ok_or("no loss")?;
    assert!(error_of(&Value::from(fields.clone()).to_string()).contains("missing field `loss`"));
    fields.insert("loss".into(), loss);
    fields.insert("tau".into(), json!(0.1));
    assert!(error_of(&Value::from(fields.clone()).to_string()).contains("unknown field `tau`"));
    let text = example()?.to_string();
    assert!(error_of(&format!("{text} 1")).contains("after the last field"));
    Ok(())
}

#[test]
fn optional_fields_may_be_left_out() -> Outcome {
    let text = std::fs::read_to_string(golden("gte_plain.json"))?;
    let mut file: Value = serde_json::from_str(&text)?;
    let fields = file.as_object_mut().ok_or("not an object")?;
    for name in
        ["positives", "weights", "query_ids", "passage_ids", "hard_negative_owner", "hard_negative_scope", "margin"]
    {
        fields.remove(name).ok_or(name)?;
    }
    let case = Case::parse(&file.to_string())?;
    let pairs = case.problem.pairs()?;
    assert!((0..pairs.rows()).all(|i| pairs.positive(i) == i));
    assert_eq!(case.expected.row_losses, Case::parse(&text)?.expected.row_losses);
    Ok(())
}

#[test]
fn a_truncated_file_is_refused_at_every_length() -> Outcome {
    let text = std::fs::read_to_string(golden("samtone_query_single_row.json"))?;
    let text = text.trim_end();
    for end in 0..text.len() {
        assert!(Case::parse(&text[..end]).is_err(), "the first {end} bytes were accepted");
    }
    let error = error_of(&text[..text.find("\"p\"").ok_or("no p")? - 10]);
    assert!(error.starts_with("field `q") && error.contains("EOF"), "{error}");
    Ok(())
}

#[test]
fn unreadable_paths_are_named() {
    let absent = golden("absent.json");
    let error = Case::read(&absent).err().unwrap_or_default();
    assert!(error.starts_with(&absent.display().to_string()), "{error}");
    let empty = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    assert!(files(&empty).err().unwrap_or_default().contains("no .json file"));
}
