//! What containerd says of a pod when it asks for its sandbox: CRI's `PodSandboxConfig`
//! (`k8s.io/cri-api/pkg/apis/runtime/v1/api.proto`), as far as it says how the pod is made.

use std::collections::BTreeMap;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::protobuf::{self, Message, UnknownFields, UnknownValueRef};

/// What the type of the message ends with, under all names that containerd has for it.
const TYPE: &str = "PodSandboxConfig";

/// What is wrong with it.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// Another message.
    #[error("options: {0:?} is no PodSandboxConfig of CRI's")]
    Type(String),
    /// No message.
    #[error("options: {0}")]
    Malformed(#[from] protobuf::Error),
    /// A text that is none.
    #[error("options: field {0} is not UTF-8")]
    Text(u32),
}

/// Whose namespace of a kind is meant.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// The pod's.
    #[default]
    Pod,
    /// Each container's own.
    Container,
    /// The node's.
    Node,
}

/// A range of users or groups: inside, outside, how many.
pub type Range = (u32, u32, u32);

/// A pod.
#[derive(Debug, Default, PartialEq)]
pub struct Pod {
    /// Its name, namespace and uid.
    pub name: String,
    pub uid: String,
    pub namespace: String,
    /// Empty: the node's.
    pub hostname: String,
    /// Where its containers log to.
    pub log_directory: String,
    /// Servers, searches and options; none: those of the node.
    pub dns: Option<[Vec<String>; 3]>,
    pub annotations: BTreeMap<String, String>,
    /// The control group its own are below.
    pub cgroup_parent: String,
    pub sysctls: BTreeMap<String, String>,
    pub network: Mode,
    pub pid: Mode,
    pub ipc: Mode,
    /// Users and groups of its user namespace, if it has one.
    pub users: Option<[Vec<Range>; 2]>,
    /// Period and quota of CPU, shares, and bytes of memory of its containers together, if that is said.
    pub resources: Option<[i64; 4]>,
}

impl Pod {
    /// Reads it. Nothing at all is a pod of which nothing is said.
    pub fn read(options: &Any) -> Result<Self, PodError> {
        if options.type_url.is_empty() && options.value.is_empty() {
            return Ok(Self::default());
        }
        if !options.type_url.ends_with(TYPE) {
            return Err(PodError::Type(options.type_url.clone()));
        }
        let config = Fields::read(&options.value)?;
        let metadata = config.message(1)?;
        let linux = config.message(8)?;
        let security = linux.message(2)?;
        let namespaces = security.message(1)?;
        let users = namespaces.message(5)?;
        // There may be an empty one, which says that there is nothing.
        let dns = config.last(4).is_some().then(|| config.message(4)).transpose()?;
        let resources = linux.last(5).is_some().then(|| linux.message(5)).transpose()?;
        let ranges = |number| {
            let range = |bytes: &[u8]| {
                let range = Fields::read(bytes)?;
                let number = |field| u32::try_from(range.number(field)).unwrap_or(u32::MAX);
                Ok((number(2), number(1), number(3)))
            };
            users.all(number).map(range).collect::<Result<Vec<_>, PodError>>()
        };
        Ok(Self {
            name: metadata.text(1)?,
            uid: metadata.text(2)?,
            namespace: metadata.text(3)?,
            hostname: config.text(2)?,
            log_directory: config.text(3)?,
            dns: dns.map(|dns| Ok::<_, PodError>([dns.texts(1)?, dns.texts(2)?, dns.texts(3)?])).transpose()?,
            annotations: config.map(7)?,
            cgroup_parent: linux.text(1)?,
            sysctls: linux.map(3)?,
            network: Mode::of(namespaces.number(1)),
            pid: Mode::of(namespaces.number(2)),
            ipc: Mode::of(namespaces.number(3)),
            // Mode POD, which is 0: a message that is there means a namespace, unless it says otherwise.
            users: match namespaces.last(5) {
                Some(_) if Mode::of(users.number(1)) == Mode::Pod => Some([ranges(2)?, ranges(3)?]),
                _ => None,
            },
            resources: resources.map(|fields| [1, 2, 3, 4].map(|number| fields.number(number).cast_signed())),
        })
    }
}

impl Mode {
    fn of(number: u64) -> Self {
        match number {
            1 => Self::Container,
            2 => Self::Node,
            _ => Self::Pod,
        }
    }
}

/// The fields of a message by their numbers.
struct Fields(UnknownFields);

impl Fields {
    fn read(bytes: &[u8]) -> Result<Self, PodError> {
        let mut message = Empty::parse_from_bytes(bytes)?;
        Ok(Self(std::mem::take(message.special_fields.mut_unknown_fields())))
    }

    fn all(&self, number: u32) -> impl Iterator<Item = &[u8]> {
        self.0.iter().filter_map(move |(found, value)| match value {
            UnknownValueRef::LengthDelimited(bytes) if found == number => Some(bytes),
            _ => None,
        })
    }

    fn last(&self, number: u32) -> Option<&[u8]> {
        self.all(number).last()
    }

    /// A message that is not there is an empty one.
    fn message(&self, number: u32) -> Result<Self, PodError> {
        Self::read(self.last(number).unwrap_or_default())
    }

    fn texts(&self, number: u32) -> Result<Vec<String>, PodError> {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).map_err(|_| PodError::Text(number));
        self.all(number).map(text).collect()
    }

    fn text(&self, number: u32) -> Result<String, PodError> {
        Ok(self.texts(number)?.pop().unwrap_or_default())
    }

    fn map(&self, number: u32) -> Result<BTreeMap<String, String>, PodError> {
        let entry = |bytes: &[u8]| {
            let entry = Self::read(bytes)?;
            Ok((entry.text(1)?, entry.text(2)?))
        };
        self.all(number).map(entry).collect()
    }

    fn number(&self, number: u32) -> u64 {
        let value = self.0.iter().filter_map(|(found, value)| match value {
            UnknownValueRef::Varint(value) if found == number => Some(value),
            _ => None,
        });
        value.last().unwrap_or_default()
    }
}
