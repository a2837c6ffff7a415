//! Joining two interfaces of a network namespace: each frame that arrives at one leaves through the other, before the
//! namespace's own stack sees it, but for what a resolver in the namespace needs.
//!
//! It is a table of nftables with one chain at the ingress of each, and the table has an owner: the netlink socket that made
//! it. When the last copy of that socket is closed the kernel removes the table. Whoever holds it, the machine's process, may
//! be killed at any moment, and nothing stays on an interface that belongs to somebody else.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::nftables::{
    Hook, Life, NFT_CMP_EQ, NFT_CMP_GTE, NFT_CMP_LTE, NFT_META_L4PROTO, NFT_META_PROTOCOL, NFT_PAYLOAD_NETWORK_HEADER,
    NFT_PAYLOAD_TRANSPORT_HEADER, NFT_REG_1, Rule, Table, exists, open,
};
use super::resolver::PORTS;

// include/uapi/linux/netfilter/nf_tables.h: what the libc crate has not.
const NF_NETDEV_INGRESS: u32 = 0;
const NFTA_FWD_SREG_DEV: u16 = 1;
const NFTA_DUP_SREG_DEV: u16 = 2;

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
    let name = table(interface.index);
    let mut table = Table::new(libc::NFPROTO_NETDEV, &name, Life::OfSocket);
    for (chain, from, to) in [(IN, interface, other), (OUT, other, interface)] {
        table.chain(chain, &Hook { number: NF_NETDEV_INGRESS, priority: PRIORITY, device: Some(from.name) });
        let rules = if chain == IN && beside == Beside::Resolver { &[ARP, NEIGHBOUR, ANSWER, ALL][..] } else { &[ALL] };
        for add in rules {
            table.rule(chain, |rule| add(rule, to));
        }
    }
    match table.make(&netlink) {
        Ok(()) => Ok(netlink.into()),
        // A table that has another owner may not even be named.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) && exists(&netlink, libc::NFPROTO_NETDEV, &name)? => {
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
    rule.immediate(NFT_REG_1, &to.index.to_ne_bytes());
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
    duplicate_and_accept(rule, to);
};

/// The same for IPv6, by advertisements.
const NEIGHBOUR: Add = |rule, to| {
    rule.meta_is(NFT_META_L4PROTO, &[libc::IPPROTO_ICMPV6 as u8]);
    rule.payload(NFT_PAYLOAD_TRANSPORT_HEADER, 0, 1);
    rule.compare(NFT_CMP_EQ, &[136]);
    duplicate_and_accept(rule, to);
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

fn duplicate_and_accept(rule: &mut Rule<'_>, to: End<'_>) {
    rule.immediate(NFT_REG_1, &to.index.to_ne_bytes());
    rule.expression("dup", |data| {
        data.put(NFTA_DUP_SREG_DEV, &NFT_REG_1.to_be_bytes());
    });
    rule.accept();
}

/// Whether an interface of the namespace of this thread is joined to another.
pub fn is_joined(index: u32) -> io::Result<bool> {
    exists(&open()?, libc::NFPROTO_NETDEV, &table(index))
}

/// By the number: another interface may get the name of one that is gone.
fn table(index: u32) -> String {
    format!("podhull-{index}")
}
