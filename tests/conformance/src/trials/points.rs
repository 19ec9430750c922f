//! Points and the present, when nothing goes wrong.

use anyhow::ensure;
use snapcore::ErrorKind;

use super::{Statement, trees, trees_with_deletes};
use crate::house::{House, Op};

pub(super) const STATEMENTS: [Statement; 12] = [
    Statement::always("a create leaves the present byte for byte", |shop, way| {
        let mut house = House::new(shop, way)?;
        house.create("a")?;
        house.is_as_the_model()
    }),
    Statement::always("what is written after a point is not in it", |shop, way| {
        let mut house = House::new(shop, way)?;
        house.create("a")?;
        house.write_somewhere()?;
        house.is_as_the_model()?;
        house.revert("a")?;
        house.is_as_the_model()
    }),
    Statement::always("a point can be returned to again and again", |shop, way| {
        let mut house = House::new(shop, way)?;
        house.create("a")?;
        for _ in 0..4 {
            house.write_somewhere()?;
            house.revert("a")?;
            house.is_as_the_model()?;
        }
        Ok(())
    }),
    Statement::with("a revert leaves every other point as it was", trees, |shop, way| {
        let mut house = House::furnished(shop, way)?;
        for name in ["a", "c", "b", "c", "a"] {
            house.revert(name)?;
            house.is_as_the_model()?;
            house.write_somewhere()?;
        }
        house.is_whole()
    }),
    Statement::with("a branch leaves its siblings as they were", trees, |shop, way| {
        let mut house = House::furnished(shop, way)?;
        for (from, name) in [("a", "a1"), ("b", "b1"), ("a1", "a2"), ("a", "a3")] {
            house.revert(from)?;
            house.write_somewhere()?;
            house.create(name)?;
            house.write_somewhere()?;
        }
        house.is_whole()
    }),
    Statement::with("a revert that saves the present loses nothing", trees, |shop, way| {
        let mut house = House::furnished(shop, way)?;
        house.run(&Op::Revert { to: "a".into(), save: Some("saved".into()) })?;
        house.is_as_the_model()?;
        house.write_somewhere()?;
        house.run(&Op::Revert { to: "saved".into(), save: Some("again".into()) })?;
        house.is_whole()
    }),
    Statement::with("delete of a middle point keeps all others", trees_with_deletes, |shop, way| {
        let mut house = House::furnished(shop, way)?;
        house.delete(&["b"])?;
        house.is_whole()
    }),
    Statement::with("delete of a root keeps all that grew from it", trees_with_deletes, |shop, way| {
        let mut house = House::furnished(shop, way)?;
        house.revert("a")?;
        house.write_somewhere()?;
        house.create("a1")?;
        house.delete(&["a"])?;
        house.is_whole()
    }),
    Statement::always("delete of the newest point keeps the present", |shop, way| {
        let mut house = House::furnished(shop, way)?;
        let newest = house.model.current.clone().unwrap_or_default();
        house.delete(&[&newest])?;
        house.is_whole()
    }),
    Statement::always("after all points are deleted nothing of them is left", |shop, way| {
        let mut house = House::new(shop, way)?;
        let before = house.footprint()?;
        for name in ["a", "b"] {
            house.create(name)?;
            house.write_somewhere()?;
            if !house.capabilities()?.snapshot_of_snapshot {
                break;
            }
        }
        house.revert("a")?;
        house.write_somewhere()?;
        let all: Vec<String> = house.model.points.keys().cloned().collect();
        house.run(&Op::Delete(all))?;
        house.is_as_the_model()?;
        let after = house.footprint()?;
        ensure!(before == after, "there was {before:?}, and there is {after:?}");
        Ok(())
    }),
    Statement::with(
        "what is declared as impossible is refused before anything",
        trees_with_deletes,
        |shop, way| {
            let mut house = House::furnished(shop, way)?;
            let declared = house.capabilities()?;
            let (mut one_point, mut no_middle) = (declared.clone(), declared);
            one_point.snapshot_of_snapshot = false;
            no_middle.delete_in_chain = false;
            house.process()?.strikes.declare(one_point);
            for op in [Op::Create("d".into()), Op::Revert { to: "a".into(), save: Some("d".into()) }] {
                house.is_refused(&op, ErrorKind::Unsupported)?;
            }
            house.process()?.strikes.declare(no_middle);
            house.is_refused(&Op::Delete(vec!["b".into()]), ErrorKind::Unsupported)?;
            house.is_refused(&Op::Delete(vec!["a".into(), "b".into()]), ErrorKind::Unsupported)?;
            house.delete(&["c"])?;
            house.delete(&["a", "b"])?;
            house.is_whole()
        },
    ),
    Statement::always("a lost catalogue comes back from the manifests", |shop, way| {
        let mut house = House::furnished(shop, way)?;
        let paths: Vec<_> = house.records()?.into_iter().map(|record| record.disk.path).collect();
        let capabilities = house.capabilities()?;
        let format = house.records()?[0].disk.format.clone();
        ensure!(capabilities.internal || capabilities.external, "it declares no kind of point");
        house.lose_the_catalogue()?;
        let images = snapcore::DomainRef::images(&paths)?.format(format);
        let process = house.process()?;
        let report = process.wait(process.service.import(&images, Default::default()))?;
        ensure!(report.notes.is_empty(), "it was told: {:?}", report.notes);
        house.is_whole()
    }),
];
