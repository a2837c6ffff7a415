//! What a JSON document has: its keys, in the order they are written in, and the types of its values.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};

/// A value without what it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shape {
    /// Keys and what they have, as they come.
    Object(Vec<(String, Shape)>),
    /// What its elements have, each of them once.
    List(Vec<Shape>),
    /// A text.
    Text,
    /// A number.
    Number,
    /// True or false.
    Truth,
    /// Nothing.
    Null,
}

impl Shape {
    /// All keys below, by their paths, in order.
    pub fn keys(&self) -> Vec<String> {
        let mut found = Vec::new();
        self.walk("", &mut found);
        found
    }

    fn walk(&self, path: &str, found: &mut Vec<String>) {
        match self {
            Self::Object(members) => {
                for (key, member) in members {
                    let path = format!("{path}/{key}");
                    found.push(path.clone());
                    member.walk(&path, found);
                }
            }
            Self::List(elements) => elements.iter().for_each(|element| element.walk(path, found)),
            Self::Text | Self::Number | Self::Truth | Self::Null => {}
        }
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Shapes)
    }
}

struct Shapes;

impl<'de> Visitor<'de> for Shapes {
    type Value = Shape;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Shape, A::Error> {
        let mut members = Vec::new();
        while let Some(member) = map.next_entry()? {
            members.push(member);
        }
        Ok(Shape::Object(members))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Shape, A::Error> {
        let mut elements = Vec::new();
        while let Some(element) = sequence.next_element()? {
            if !elements.contains(&element) {
                elements.push(element);
            }
        }
        Ok(Shape::List(elements))
    }

    fn visit_str<E>(self, _: &str) -> Result<Shape, E> {
        Ok(Shape::Text)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Shape, E> {
        Ok(Shape::Truth)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Shape, E> {
        Ok(Shape::Number)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Shape, E> {
        Ok(Shape::Number)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Shape, E> {
        Ok(Shape::Number)
    }

    fn visit_unit<E>(self) -> Result<Shape, E> {
        Ok(Shape::Null)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Outcome, ensure_eq};

    #[test]
    fn keys_are_in_the_order_of_the_text() -> Outcome {
        let shape: Shape = serde_json::from_str(
            r#"[{"b":1,"a":{"d":"x","c":[true,false,null]}},{"b":2,"a":{"d":"","c":[true,null]}}]"#,
        )?;
        ensure_eq!(shape.keys(), ["/b", "/a", "/a/d", "/a/c"], "keys of {shape:?}");
        let other: Shape = serde_json::from_str(r#"[{"a":{"d":"x","c":[true,null]},"b":1}]"#)?;
        ensure_eq!(shape == other, false, "another order");
        Ok(())
    }
}
