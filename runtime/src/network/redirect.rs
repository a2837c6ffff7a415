//! Joining two interfaces of a network namespace: each frame that arrives at one leaves through the other, before the
//! namespace's own stack sees it, but for what a resolver in the namespace needs.
//!
//! It is a table of nftables with one chain at the ingress of each, and the table has an owner: the netlink socket that made
//! it. When the last copy of that socket is closed the kernel removes the table. Whoever holds it, the machine's process, may
//! be killed at any moment, and nothing stays on an interface that belongs to somebody else.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::netlink::{Attributes, Messages, Netlink};
use super::resolver::PORTS;

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
const NF_NETDEV_INGRESS: u32 = 0;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_IMMEDIATE_DREG: u16 = 1;
const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_FWD_SREG_DEV: u16 = 1;
const NFTA_DUP_SREG_DEV: u16 = 2;
const NFT_REG_VERDICT: u32 = 0;
const NFT_REG_1: u32 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NF_ACCEPT: u32 = 1;
const NFTA_META_DREG: u16 = 1;
const NFTA_META_KEY: u16 = 2;
const NFT_META_PROTOCOL: u32 = 1;
const NFT_META_L4PROTO: u32 = 16;
const NFTA_PAYLOAD_DREG: u16 = 1;
const NFTA_PAYLOAD_BASE: u16 = 2;
const NFTA_PAYLOAD_OFFSET: u16 = 3;
const NFTA_PAYLOAD_LEN: u16 = 4;
const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;
const NFT_PAYLOAD_TRANSPORT_HEADER: u32 = 2;
const NFTA_CMP_SREG: u16 = 1;
const NFTA_CMP_OP: u16 = 2;
const NFTA_CMP_DATA: u16 = 3;
const NFT_CMP_EQ: u32 = 0;
const NFT_CMP_LTE: u32 = 3;
const NFT_CMP_GTE: u32 = 5;

/// Behind all chains of others: what they drop or change they drop or change here too.
const PRIORITY: i32 = i32::MAX;

/// One of the two interfaces.
#[derive(Clone, Copy)]
pub struct End<'a> {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: &'a str,
}

/// Who else, beside the machine, gets what arrives at an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beside {
    /// Nobody.
    Nobody,
    /// A resolver in the namespace ([`super::resolver`]).
    Resolver,
}

/// Joins an interface to another, in the namespace of this thread, for as long as what is returned is open.
/// [`io::ErrorKind::AlreadyExists`] if it is joined to one already.
pub fn join(interface: End<'_>, other: End<'_>, beside: Beside) -> io::Result<OwnedFd> {
    let netlink = open()?;
    let table = table(interface.index);
    let mut messages = Messages::new();
    messages.message(libc::NFNL_MSG_BATCH_BEGIN as u16, libc::NLM_F_REQUEST as u16, &batch());
    let create = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    messages
        .request(NFTABLES | libc::NFT_MSG_NEWTABLE as u16, create, &header())
        .text(NFTA_TABLE_NAME, &table)
        .put(NFTA_TABLE_FLAGS, &NFT_TABLE_F_OWNER.to_be_bytes());
    for (chain, from, to) in [(IN, interface, other), (OUT, other, interface)] {
        let mut attributes = messages.request(NFTABLES | libc::NFT_MSG_NEWCHAIN as u16, create, &header());
        attributes.text(NFTA_CHAIN_TABLE, &table).text(NFTA_CHAIN_NAME, chain).text(NFTA_CHAIN_TYPE, "filter");
        attributes
            .nest(NFTA_CHAIN_HOOK)
            .put(NFTA_HOOK_HOOKNUM, &NF_NETDEV_INGRESS.to_be_bytes())
            .put(NFTA_HOOK_PRIORITY, &PRIORITY.to_be_bytes())
            .text(NFTA_HOOK_DEV, from.name);
        drop(attributes);
        let rules = if chain == IN && beside == Beside::Resolver { &[ARP, NEIGHBOUR, ANSWER, ALL][..] } else { &[ALL] };
        for add in rules {
            let append = libc::NLM_F_CREATE | libc::NLM_F_APPEND;
            let mut attributes = messages.request(NFTABLES | libc::NFT_MSG_NEWRULE as u16, append, &header());
            attributes.text(NFTA_RULE_TABLE, &table).text(NFTA_RULE_CHAIN, chain);
            add(&mut Rule(attributes.nest(NFTA_RULE_EXPRESSIONS)), to);
        }
    }
    messages.message(libc::NFNL_MSG_BATCH_END as u16, libc::NLM_F_REQUEST as u16, &batch());
    match netlink.request(&messages) {
        Ok(()) => Ok(netlink.into()),
        // A table that has another owner may not even be named.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) && exists(&netlink, &table)? => {
            Err(Errno::EXIST.into())
        }
        Err(error) => Err(error),
    }
}

/// What arrives at the interface, and at the other.
const IN: &str = "in";
const OUT: &str = "out";

/// A rule: what it adds its expressions to, and where frames go.
type Add = fn(&mut Rule<'_>, End<'_>);

/// Each frame leaves through the other interface.
const ALL: Add = |rule, to| {
    rule.immediate(&to.index.to_ne_bytes());
    rule.expression("fwd", |data| {
        data.put(NFTA_FWD_SREG_DEV, &NFT_REG_1.to_be_bytes());
    });
};

/// Both sides hear who has which address: the namespace's own stack must know where to send to.
const ARP: Add = |rule, to| {
    rule.meta_is(NFT_META_PROTOCOL, &(libc::ETH_P_ARP as u16).to_be_bytes());
    // Replies.
    rule.payload(NFT_PAYLOAD_NETWORK_HEADER, 6, 2);
    rule.compare(NFT_CMP_EQ, &2u16.to_be_bytes());
    rule.duplicate_and_accept(to);
};

/// The same for IPv6, by advertisements.
const NEIGHBOUR: Add = |rule, to| {
    rule.meta_is(NFT_META_L4PROTO, &[libc::IPPROTO_ICMPV6 as u8]);
    rule.payload(NFT_PAYLOAD_TRANSPORT_HEADER, 0, 1);
    rule.compare(NFT_CMP_EQ, &[136]);
    rule.duplicate_and_accept(to);
};

/// Answers to the resolver are its own.
const ANSWER: Add = |rule, _| {
    rule.payload(NFT_PAYLOAD_TRANSPORT_HEADER, 0, 2);
    rule.compare(NFT_CMP_EQ, &53u16.to_be_bytes());
    rule.payload(NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2);
    rule.compare(NFT_CMP_GTE, &PORTS.start().to_be_bytes());
    rule.compare(NFT_CMP_LTE, &PORTS.end().to_be_bytes());
    rule.accept();
};

/// A rule in the making: its expressions are worked off in order, with one register.
struct Rule<'a>(Attributes<'a>);

impl Rule<'_> {
    fn expression(&mut self, name: &str, fill: impl FnOnce(&mut Attributes<'_>)) {
        let mut expression = self.0.nest(NFTA_LIST_ELEM);
        expression.text(NFTA_EXPR_NAME, name);
        fill(&mut expression.nest(NFTA_EXPR_DATA));
    }

    /// Loads a value. A register holds the number of an interface as the processor does.
    fn immediate(&mut self, value: &[u8]) {
        self.expression("immediate", |data| {
            data.put(NFTA_IMMEDIATE_DREG, &NFT_REG_1.to_be_bytes());
            data.nest(NFTA_IMMEDIATE_DATA).put(NFTA_DATA_VALUE, value);
        });
    }

    /// Loads what is known of the frame, and goes on only if it is this.
    fn meta_is(&mut self, key: u32, value: &[u8]) {
        self.expression("meta", |data| {
            data.put(NFTA_META_DREG, &NFT_REG_1.to_be_bytes()).put(NFTA_META_KEY, &key.to_be_bytes());
        });
        self.compare(NFT_CMP_EQ, value);
    }

    /// Loads bytes of a header; a frame that has not as many is not meant.
    fn payload(&mut self, header: u32, offset: u32, length: u32) {
        self.expression("payload", |data| {
            data.put(NFTA_PAYLOAD_DREG, &NFT_REG_1.to_be_bytes())
                .put(NFTA_PAYLOAD_BASE, &header.to_be_bytes())
                .put(NFTA_PAYLOAD_OFFSET, &offset.to_be_bytes())
                .put(NFTA_PAYLOAD_LEN, &length.to_be_bytes());
        });
    }

    /// Goes on only if what was loaded compares so.
    fn compare(&mut self, how: u32, value: &[u8]) {
        self.expression("cmp", |data| {
            data.put(NFTA_CMP_SREG, &NFT_REG_1.to_be_bytes()).put(NFTA_CMP_OP, &how.to_be_bytes());
            data.nest(NFTA_CMP_DATA).put(NFTA_DATA_VALUE, value);
        });
    }

    /// The namespace's own stack gets the frame.
    fn accept(&mut self) {
        self.expression("immediate", |data| {
            data.put(NFTA_IMMEDIATE_DREG, &NFT_REG_VERDICT.to_be_bytes());
            let mut value = data.nest(NFTA_IMMEDIATE_DATA);
            value.nest(NFTA_DATA_VERDICT).put(NFTA_VERDICT_CODE, &NF_ACCEPT.to_be_bytes());
        });
    }

    fn duplicate_and_accept(&mut self, to: End<'_>) {
        self.immediate(&to.index.to_ne_bytes());
        self.expression("dup", |data| {
            data.put(NFTA_DUP_SREG_DEV, &NFT_REG_1.to_be_bytes());
        });
        self.accept();
    }
}

/// Whether an interface of the namespace of this thread is joined to another.
pub fn is_joined(index: u32) -> io::Result<bool> {
    exists(&open()?, &table(index))
}

fn open() -> io::Result<Netlink> {
    Netlink::open(Some(rustix::net::netlink::NETFILTER))
}

fn exists(netlink: &Netlink, table: &str) -> io::Result<bool> {
    let mut messages = Messages::new();
    messages.request(NFTABLES | libc::NFT_MSG_GETTABLE as u16, 0, &header()).text(NFTA_TABLE_NAME, table);
    match netlink.request(&messages) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// By the number: another interface may get the name of one that is gone.
fn table(index: u32) -> String {
    format!("podhull-{index}")
}

/// `struct nfgenmsg`: of what concerns devices.
fn header() -> [u8; 4] {
    [libc::NFPROTO_NETDEV as u8, 0, 0, 0]
}

/// `struct nfgenmsg` around the messages that are to become true at once.
fn batch() -> [u8; 4] {
    let [high, low] = (libc::NFNL_SUBSYS_NFTABLES as u16).to_be_bytes();
    [libc::AF_UNSPEC as u8, 0, high, low]
}
