//! Tables of nftables: one with its chains and rules, which becomes true at once, and rules expression by expression.

use std::io;

use rustix::net::netlink::NETFILTER;

use super::netlink::{Attributes, Messages, Netlink};

/// Subsystem of nftables, which is the high byte of its message types.
const NFTABLES: u16 = (libc::NFNL_SUBSYS_NFTABLES << 8) as u16;

// include/uapi/linux/netfilter/nf_tables.h: what the libc crate has not.
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_FLAGS: u16 = 2;
const NFT_TABLE_F_OWNER: u32 = 2;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_HOOK_DEV: u16 = 3;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_IMMEDIATE_DREG: u16 = 1;
const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFT_REG_VERDICT: u32 = 0;
const NF_ACCEPT: u32 = 1;
const NFTA_META_DREG: u16 = 1;
const NFTA_META_KEY: u16 = 2;
const NFTA_PAYLOAD_DREG: u16 = 1;
const NFTA_PAYLOAD_BASE: u16 = 2;
const NFTA_PAYLOAD_OFFSET: u16 = 3;
const NFTA_PAYLOAD_LEN: u16 = 4;
const NFTA_CMP_SREG: u16 = 1;
const NFTA_CMP_OP: u16 = 2;
const NFTA_CMP_DATA: u16 = 3;

/// Where expressions keep a value of up to 16 bytes, and the register that has further values.
pub const NFT_REG_1: u32 = 1;
pub const NFT_REG_2: u32 = 2;

// What `meta_is` is asked for.
pub const NFT_META_PROTOCOL: u32 = 1;
pub const NFT_META_IIF: u32 = 4;
pub const NFT_META_NFPROTO: u32 = 15;
pub const NFT_META_L4PROTO: u32 = 16;

// Headers of a packet, and how their bytes are compared.
pub const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;
pub const NFT_PAYLOAD_TRANSPORT_HEADER: u32 = 2;
pub const NFT_CMP_EQ: u32 = 0;
pub const NFT_CMP_LTE: u32 = 3;
pub const NFT_CMP_GTE: u32 = 5;

/// Until when a table is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// As long as the socket that made it is open; nobody else may change it.
    OfSocket,
    /// As long as the network namespace.
    OfNamespace,
}

/// Where packets come into a chain.
pub struct Hook<'a> {
    /// By the numbers of the table's family.
    pub number: u32,
    /// Lower ones are first.
    pub priority: i32,
    /// In the family of devices: which.
    pub device: Option<&'a str>,
}

/// A table in the making.
pub struct Table<'a> {
    family: u8,
    name: &'a str,
    messages: Messages,
}

impl<'a> Table<'a> {
    /// One without chains, of a family (`NFPROTO_*`).
    pub fn new(family: i32, name: &'a str, life: Life) -> Self {
        let mut table = Self { family: family as u8, name, messages: Messages::new() };
        table.messages.message(libc::NFNL_MSG_BATCH_BEGIN as u16, libc::NLM_F_REQUEST as u16, &batch());
        let flags = match life {
            Life::OfSocket => NFT_TABLE_F_OWNER,
            Life::OfNamespace => 0,
        };
        let mut attributes = table.request(libc::NFT_MSG_NEWTABLE, libc::NLM_F_EXCL);
        attributes.text(NFTA_TABLE_NAME, name).put(NFTA_TABLE_FLAGS, &flags.to_be_bytes());
        drop(attributes);
        table
    }

    /// Adds a chain of filters.
    pub fn chain(&mut self, name: &str, hook: &Hook<'_>) {
        let table = self.name;
        let mut attributes = self.request(libc::NFT_MSG_NEWCHAIN, libc::NLM_F_EXCL);
        attributes.text(NFTA_CHAIN_TABLE, table).text(NFTA_CHAIN_NAME, name).text(NFTA_CHAIN_TYPE, "filter");
        let mut place = attributes.nest(NFTA_CHAIN_HOOK);
        place.put(NFTA_HOOK_HOOKNUM, &hook.number.to_be_bytes());
        place.put(NFTA_HOOK_PRIORITY, &hook.priority.to_be_bytes());
        if let Some(device) = hook.device {
            place.text(NFTA_HOOK_DEV, device);
        }
    }

    /// Adds a rule behind those that a chain has.
    pub fn rule(&mut self, chain: &str, fill: impl FnOnce(&mut Rule<'_>)) {
        let table = self.name;
        let mut attributes = self.request(libc::NFT_MSG_NEWRULE, libc::NLM_F_APPEND);
        attributes.text(NFTA_RULE_TABLE, table).text(NFTA_RULE_CHAIN, chain);
        fill(&mut Rule(attributes.nest(NFTA_RULE_EXPRESSIONS)));
    }

    /// Makes it, in the namespace of the socket.
    pub fn make(mut self, netlink: &Netlink) -> io::Result<()> {
        self.messages.message(libc::NFNL_MSG_BATCH_END as u16, libc::NLM_F_REQUEST as u16, &batch());
        netlink.request(&self.messages)
    }

    fn request(&mut self, kind: i32, flags: i32) -> Attributes<'_> {
        let kind = NFTABLES | kind as u16;
        self.messages.request(kind, libc::NLM_F_CREATE | flags, &header(self.family))
    }
}

/// A rule in the making: its expressions are worked off in order, most with one register.
pub struct Rule<'a>(Attributes<'a>);

impl Rule<'_> {
    /// Appends one by its name.
    pub fn expression(&mut self, name: &str, fill: impl FnOnce(&mut Attributes<'_>)) {
        let mut expression = self.0.nest(NFTA_LIST_ELEM);
        expression.text(NFTA_EXPR_NAME, name);
        fill(&mut expression.nest(NFTA_EXPR_DATA));
    }

    /// Loads a value. A register holds the number of an interface as the processor does.
    pub fn immediate(&mut self, register: u32, value: &[u8]) {
        self.expression("immediate", |data| {
            data.put(NFTA_IMMEDIATE_DREG, &register.to_be_bytes());
            data.nest(NFTA_IMMEDIATE_DATA).put(NFTA_DATA_VALUE, value);
        });
    }

    /// Loads what is known of the packet, and goes on only if it is this.
    pub fn meta_is(&mut self, key: u32, value: &[u8]) {
        self.expression("meta", |data| {
            data.put(NFTA_META_DREG, &NFT_REG_1.to_be_bytes()).put(NFTA_META_KEY, &key.to_be_bytes());
        });
        self.compare(NFT_CMP_EQ, value);
    }

    /// Loads bytes of a header; a packet that has not as many is not meant.
    pub fn payload(&mut self, header: u32, offset: u32, length: u32) {
        self.expression("payload", |data| {
            data.put(NFTA_PAYLOAD_DREG, &NFT_REG_1.to_be_bytes())
                .put(NFTA_PAYLOAD_BASE, &header.to_be_bytes())
                .put(NFTA_PAYLOAD_OFFSET, &offset.to_be_bytes())
                .put(NFTA_PAYLOAD_LEN, &length.to_be_bytes());
        });
    }

    /// Goes on only if what was loaded compares so.
    pub fn compare(&mut self, how: u32, value: &[u8]) {
        self.expression("cmp", |data| {
            data.put(NFTA_CMP_SREG, &NFT_REG_1.to_be_bytes()).put(NFTA_CMP_OP, &how.to_be_bytes());
            data.nest(NFTA_CMP_DATA).put(NFTA_DATA_VALUE, value);
        });
    }

    /// The namespace's own stack gets the packet.
    pub fn accept(&mut self) {
        self.expression("immediate", |data| {
            data.put(NFTA_IMMEDIATE_DREG, &NFT_REG_VERDICT.to_be_bytes());
            let mut value = data.nest(NFTA_IMMEDIATE_DATA);
            value.nest(NFTA_DATA_VERDICT).put(NFTA_VERDICT_CODE, &NF_ACCEPT.to_be_bytes());
        });
    }
}

/// A socket to speak to nftables of this thread's namespace.
pub fn open() -> io::Result<Netlink> {
    Netlink::open(Some(NETFILTER))
}

/// Whether there is a table of this name.
pub fn exists(netlink: &Netlink, family: i32, table: &str) -> io::Result<bool> {
    let mut messages = Messages::new();
    let kind = NFTABLES | libc::NFT_MSG_GETTABLE as u16;
    messages.request(kind, 0, &header(family as u8)).text(NFTA_TABLE_NAME, table);
    match netlink.request(&messages) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// `struct nfgenmsg`.
fn header(family: u8) -> [u8; 4] {
    [family, 0, 0, 0]
}

/// `struct nfgenmsg` around the messages that are to become true at once.
fn batch() -> [u8; 4] {
    let [high, low] = (libc::NFNL_SUBSYS_NFTABLES as u16).to_be_bytes();
    [libc::AF_UNSPEC as u8, 0, high, low]
}
